"""`accelerate`, `restore` and `accelerated`.

plan = fastgen.accelerate(pipe)          # parts that change no picture beyond rounding
print(plan)
pipe("a red circle")
fastgen.restore(pipe)                    # bit for bit as it was
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from fastgen.contracts import LOSSES, Loss, check_loss
from fastgen.errors import FastgenError
from fastgen.pipelines.accelerate.part import Part, denoising_network
from fastgen.pipelines.accelerate.parts import PARTS
from fastgen.pipelines.accelerate.plan import Plan, Row
from fastgen.pipelines.accelerate.text_encoder import memory_is_short

__all__ = ["accelerate", "accelerated", "restore"]

_undos: weakref.WeakKeyDictionary[Any, list[Callable[[], None]]] = weakref.WeakKeyDictionary()
_on: weakref.WeakKeyDictionary[Any, list[Part]] = weakref.WeakKeyDictionary()
#: Lossy parts are only turned on where their cost is known: by a plan.
_WITHOUT_PLAN = ("kernels", "channels_last", "prompt_padding", "attention", "token_stage")


def accelerate(
    pipe: DiffusionPipeline,
    loss: Loss | None = None,
    plan: Plan | str | os.PathLike[str] | Iterable[Part] | None = None,
    compiling: tuple[bool, str] | None = None,
) -> Plan:
    """Make a pipeline faster; what was turned on by an earlier call is turned off first.

    Without a plan, the parts are turned on that are exact and pay on its device. `fastgen tune` measures which others
    pay for a model on a machine, and writes a plan.

    Args:
        pipe: any diffusers pipeline, also one that is offloaded, compiled, quantised or carries LoRA.
        loss: the weakest contract that is allowed; None is "exact" without a plan, and any with one.
        plan: a `Plan`, the file of one, or parts.
        compiling: whether to compile without a plan, and why (not); see `CompileCosts.pays`.

    Returns:
        what is on, and why the rest is off; `print` shows a table.

    Raises:
        FastgenError: a plan of another pipeline, model or version, with an unknown part, with one that cannot be used
            here, or weaker than `loss`. Nothing has changed then.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise FastgenError(f"pipe: needs a diffusers pipeline, got {type(pipe).__name__}")
    if denoising_network(pipe) is None:
        raise FastgenError(f"pipe: {type(pipe).__name__} has no denoiser (a transformer or a unet)")
    if loss is not None:
        check_loss(loss)
    if loss == "lossy" and plan is None:
        raise FastgenError("loss: 'lossy' needs a plan, which says at which settings: see `fastgen tune`")
    wanted = _wanted(pipe, plan, compiling)
    too_weak = [part.name for part in wanted.parts if LOSSES.index(part.loss) > LOSSES.index(loss or LOSSES[-1])]
    if too_weak:
        raise FastgenError(f"plan: {too_weak[0]} is not allowed under loss={loss!r}")
    restore(pipe)
    undos: list[Callable[[], None]] = []
    rows: list[Row] = []
    try:
        for row in wanted.rows:
            reason = row.part.why_not(pipe) if row.on else None
            if reason is not None and plan is not None:
                raise FastgenError(f"plan: {row.part.name} cannot be used with this {type(pipe).__name__}: {reason}")
            if row.on and reason is None:
                undos.append(row.part.enable(pipe))
            rows.append(Row(row.part, row.on and reason is None, reason or row.why))
    except BaseException:
        for undo in reversed(undos):
            undo()
        raise
    _undos[pipe] = undos
    _on[pipe] = [row.part for row in rows if row.on]
    return Plan(wanted.pipeline, tuple(rows), wanted.measured)


def switched_on(pipe: DiffusionPipeline) -> list[Part]:
    """The parts that `accelerate` turned on."""
    return list(_on.get(pipe, ())) if pipe in _undos else []


def restore(pipe: DiffusionPipeline) -> None:
    """Turn off what `accelerate` turned on; without it, nothing happens."""
    for undo in reversed(_undos.pop(pipe, [])):
        undo()


@contextmanager
def accelerated(
    pipe: DiffusionPipeline,
    loss: Loss | None = None,
    plan: Plan | str | os.PathLike[str] | Iterable[Part] | None = None,
    compiling: tuple[bool, str] | None = None,
) -> Iterator[Plan]:
    """`accelerate` inside, `restore` after, whatever happens."""
    made = accelerate(pipe, loss, plan, compiling)
    try:
        yield made
    finally:
        restore(pipe)


def _exact_plan(pipe: Any, compiling: tuple[bool, str] | None) -> Plan:
    """The parts that `accelerate` tries on a pipeline without a plan."""
    tried = (*_WITHOUT_PLAN, *(("text_encoder",) if memory_is_short(pipe) else ()))
    rows = {name: (name in tried, "" if name in tried else "by a plan only: see `fastgen tune`") for name in PARTS}
    if compiling is not None:
        rows["compile"] = compiling
    return Plan(type(pipe).__name__, tuple(Row(part(), *rows[name]) for name, part in PARTS.items()))


def _wanted(pipe: Any, plan: Any, compiling: tuple[bool, str] | None) -> Plan:
    name = type(pipe).__name__
    if plan is None:
        return _exact_plan(pipe, compiling)
    if isinstance(plan, str | os.PathLike):
        plan = Plan.load(plan)
    elif not isinstance(plan, Plan):
        parts = list(plan) if isinstance(plan, Iterable) else [plan]
        if not all(isinstance(part, Part) for part in parts):
            raise FastgenError("plan: needs a Plan, the file of one, or parts")
        plan = Plan(name, tuple(Row(part, True) for part in parts))
    if plan.pipeline != name:
        raise FastgenError(f"plan: is of a {plan.pipeline}, and this is a {name}")
    plan.check_measured(pipe)
    twice = [part.name for i, part in enumerate(plan.parts) if part.name in {p.name for p in plan.parts[:i]}]
    if twice:
        raise FastgenError(f"plan: {twice[0]} is in it twice")
    return plan
