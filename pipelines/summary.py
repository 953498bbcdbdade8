"""`summary`: what is on in a pipeline, its loss contract, and what its last call did."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastgen.accounting import Stats, account
from fastgen.contracts import Loss, weakest
from fastgen.errors import FastgenError

__all__ = ["Summary", "reported", "summary"]

# Outside the pipeline: diffusers saves and compares its attributes.
_last: weakref.WeakKeyDictionary[Any, Stats] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Summary:
    """The result of `summary`.

    Attributes:
        pipeline: name of its class.
        on: method or part of fastgen that is on -> its settings.
        loss: contract of all of them together.
        last: of the last call; None: fastgen saw none.
    """

    pipeline: str
    on: dict[str, Any]
    loss: Loss
    last: Stats | None

    def __str__(self) -> str:
        lines = [f"{self.pipeline}: {self.loss}"]
        lines += [f"  on: {name} {settings}" for name, settings in self.on.items()] or ["  on: nothing"]
        if self.last is None:
            return "\n".join([*lines, "  last call: none"])
        lines.append(f"  last call: {self.last.wall_seconds:.2f} s, {self.last.nfe} NFE, passes {self.last.passes}")
        for what, used in self.last.paths.items():
            lines += [f"    {what}: {path}" + (f" ({why})" if why else "") for path, why in used.items()]
        return "\n".join(lines)


@contextmanager
def reported(pipe: Any) -> Iterator[Stats]:
    """An account of one call of a pipeline, which `summary` shows once the call is done."""
    with account() as stats:
        yield stats
    _last[pipe] = stats


def summary(pipe: Any) -> Summary:
    """What is on in a pipeline, its contract, and what it did in its last call. Changes nothing; `print` it.

    Raises:
        FastgenError: it is no pipeline.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from fastgen.pipelines.accelerate.switch import switched_on
    from fastgen.pipelines.kernels import served

    if not isinstance(pipe, DiffusionPipeline):
        raise FastgenError(f"pipe: needs a diffusers pipeline, got {type(pipe).__name__}")
    on: dict[str, Any] = {}
    losses: list[Loss] = [getattr(pipe, "loss", "exact")]
    if hasattr(pipe, "loss"):
        on[type(pipe).__name__] = {}
    enabled = getattr(pipe, "_fastgen_dc", None)
    if enabled is not None:
        on["dynamic chunking"] = enabled.budget
        losses.append("lossy")
    for part in switched_on(pipe):
        on[part.name] = part.settings
        losses.append(part.loss)
    if kernels := served(pipe)[0]:
        on["kernels"] = {"modules": kernels}
    return Summary(type(pipe).__name__, on, weakest(losses), _last.get(pipe))
