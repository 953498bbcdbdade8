"""Which parts are on, at which settings, and why: what `accelerate` returns and `fastgen tune` writes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgen.contracts import Loss, weakest
from fastgen.environment import versions
from fastgen.errors import FastgenError
from fastgen.io import atomic_write_json, check_format, read_object
from fastgen.pipelines.accelerate.part import denoising_network
from fastgen.pipelines.accelerate.parts import Part, made_part

__all__ = ["Plan", "Row", "denoiser_digest"]

_FORMAT = 1
#: Whose versions decide what a part does and gains.
_VERSIONS = ("fastgen", "diffusers")


def denoiser_digest(pipe: Any) -> str:
    """Tells one denoiser from another by its class and configuration."""
    model = denoising_network(pipe)
    config = {name: value for name, value in dict(getattr(model, "config", {})).items() if not name.startswith("_")}
    text = json.dumps([type(model).__name__, config], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Row:
    """A part in a plan.

    Args:
        part: with its settings.
        on: whether it is on.
        why: why it is off, or what it gave where that was measured.
    """

    part: Part
    on: bool
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """Parts of `accelerate` for a pipeline.

    Args:
        pipeline: class of the pipeline.
        rows: all parts that were considered, those that are on in the order in which they are turned on.
        measured: of `fastgen tune`: seconds a picture, scores, versions, device; empty where nothing was measured.
    """

    pipeline: str
    rows: tuple[Row, ...]
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> list[Part]:
        """Those that are on."""
        return [row.part for row in self.rows if row.on]

    @property
    def loss(self) -> Loss:
        """Contract of all parts together: that of the weakest."""
        return weakest(part.loss for part in self.parts)

    def check_measured(self, pipe: Any = None, weights: str | None = None) -> None:
        """Refuse what was measured with another model or other versions; a plan without measurements passes.

        Args:
            pipe: whose denoiser is compared by class and configuration.
            weights: digest of the model's weights, where it is known.

        Raises:
            FastgenError: names what differs.
        """
        then, now = self.measured.get("versions"), versions(_VERSIONS)
        for name, version in then.items() if isinstance(then, dict) else ():
            if name in _VERSIONS and version != now.get(name):
                raise FastgenError(
                    f"plan: was measured with {name} {version}, and this is {now.get(name)}; tune again"
                )
        denoiser = None if pipe is None else denoiser_digest(pipe)
        for name, own in (("denoiser", denoiser), ("weights", weights)):
            found = self.measured.get(name)
            if own is not None and found is not None and own != found:
                model = self.measured.get("model")
                raise FastgenError(f"plan: was measured with another {self.pipeline}, {model!r}; tune this one")

    def __str__(self) -> str:
        lines = [["part", "", "contract", "settings", "why"]]
        for row in self.rows:
            settings = ", ".join(f"{name}={value}" for name, value in row.part.settings.items())
            lines.append([row.part.name, "on" if row.on else "off", row.part.loss, settings, row.why])
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        table = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )
        return f"{self.pipeline}, loss contract {self.loss}\n{table}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON."""
        atomic_write_json(path, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        rows = [
            {"part": row.part.name, "settings": row.part.settings, "on": row.on, "why": row.why} for row in self.rows
        ]
        return {"format": _FORMAT, "pipeline": self.pipeline, "parts": rows, "measured": self.measured}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` or `fastgen tune` wrote.

        Raises:
            FastgenError: there is no such file, or it is no plan.
        """
        if not Path(path).is_file():
            raise FastgenError(f"plan: there is no file {os.fspath(path)!r}")
        return cls.of_dict(read_object(path), os.fspath(path))

    @classmethod
    def of_dict(cls, data: dict[str, Any], label: str = "plan") -> Plan:
        """Build from the output of `as_dict`.

        Raises:
            FastgenError: it is no plan.
        """
        check_format(data.get("format"), label, _FORMAT)
        rows, pipeline, measured = data.get("parts"), data.get("pipeline"), data.get("measured", {})
        if not isinstance(pipeline, str) or not isinstance(rows, list) or not isinstance(measured, dict):
            raise FastgenError(f"{label}: needs a pipeline, parts and measured numbers")
        return cls(pipeline, tuple(_rows(rows, label)), measured)


def _rows(rows: list[Any], label: str) -> Iterator[Row]:
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("on", True), bool):
            raise FastgenError(f"{label}: a part must be an object with a name, settings and on")
        yield Row(made_part(row.get("part"), row.get("settings", {})), row.get("on", True), str(row.get("why", "")))
