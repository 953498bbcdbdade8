"""Measured costs and gains of compiling a denoiser on this machine, and whether a number of pictures pays for it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastgen.checks import check_number
from fastgen.environment import cpu_name, versions
from fastgen.errors import FastgenError
from fastgen.io import atomic_write_json, check_format, read_object, user_cache_dir
from fastgen.pipelines.accelerate.part import denoising_network
from fastgen.pipelines.accelerate.plan import denoiser_digest

__all__ = ["CompileCosts", "measured_costs", "pays_for_compiling", "remember_costs"]

_FORMAT = 1
#: Settings of a call whose change compiles again, or changes what a picture takes.
_SETTINGS = ("height", "width", "steps", "batch_size")


@dataclass(frozen=True)
class CompileCosts:
    """Seconds that were measured.

    Args:
        first: of the first picture, compilation included.
        compiled, plain: of each later picture, with and without compilation.
    """

    first: float
    compiled: float
    plain: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_number(name, value, above=0)

    def pays(self, pictures: int) -> tuple[bool, str]:
        """Whether compilation makes that many pictures faster together, and the numbers behind it."""
        cost, gain = max(0.0, self.first - self.compiled), (self.plain - self.compiled) * pictures
        return gain > cost, f"measured here: saves {gain:.1f} s for {pictures} pictures and takes {cost:.1f} s"


def measured_costs(pipe: Any, call: dict[str, Any]) -> CompileCosts | None:
    """The last measurement for this denoiser, machine and call; None if there is none.

    Args:
        pipe: on its device.
        call: settings of `generate_images`.
    """
    path = _file(pipe, call)
    if not path.is_file():
        return None
    try:
        data = read_object(path)
        check_format(data.pop("format", None), path, _FORMAT)
        return CompileCosts(**data)
    except (FastgenError, TypeError):  # written by another version: measured again by the next `fastgen tune`
        return None


def pays_for_compiling(pipe: Any, call: dict[str, Any], pictures: int) -> tuple[bool, str]:
    """Whether this many pictures pay for compilation by the costs measured so far, and why (not)."""
    costs = measured_costs(pipe, call)
    if costs is None:
        return False, "its cost was not measured here: see `fastgen tune --compile`"
    return costs.pays(pictures)


def remember_costs(pipe: Any, call: dict[str, Any], costs: CompileCosts) -> None:
    """Write down what was measured, for later runs."""
    path = _file(pipe, call)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, {"format": _FORMAT, **asdict(costs)})


def _file(pipe: Any, call: dict[str, Any]) -> Path:
    where = torch.device(pipe._execution_device)
    processor = torch.cuda.get_device_name(where) if where.type == "cuda" else cpu_name()
    here = [processor, torch.get_num_threads(), versions(("torch", "diffusers"))]
    asked = [call.get(name) for name in _SETTINGS]
    text = json.dumps([denoiser_digest(pipe), str(denoising_network(pipe).dtype), here, asked])
    return user_cache_dir() / "compile" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
