"""All parts of `accelerate`, by name."""

from __future__ import annotations

from dataclasses import fields

from fastgen.errors import FastgenError
from fastgen.pipelines.accelerate.budgets import FewerSteps, TailDrops
from fastgen.pipelines.accelerate.exact import ChannelsLast, Compile, Kernels
from fastgen.pipelines.accelerate.guidance import Guidance
from fastgen.pipelines.accelerate.part import Part
from fastgen.pipelines.accelerate.step_cache import StepCache

__all__ = [
    "PARTS",
    "ChannelsLast",
    "Compile",
    "FewerSteps",
    "Guidance",
    "Kernels",
    "Part",
    "StepCache",
    "TailDrops",
    "made_part",
]

#: In the order in which they are turned on.
PARTS: dict[str, type[Part]] = {
    each.name: each for each in (Kernels, ChannelsLast, Compile, StepCache, Guidance, TailDrops, FewerSteps)
}


def made_part(name: object, settings: object) -> Part:
    """A part by its name in a plan.

    Raises:
        FastgenError: there is none of that name, or it does not have such settings.
    """
    if not isinstance(name, str) or name not in PARTS:
        raise FastgenError(f"plan: part {name!r} is unknown, there are {', '.join(PARTS)}")
    if not isinstance(settings, dict):
        raise FastgenError(f"plan: settings of {name} must be an object, got {type(settings).__name__}")
    known = {each.name for each in fields(PARTS[name])}  # type: ignore[arg-type]
    if unknown := sorted(set(settings) - known):
        raise FastgenError(f"plan: {name} has no setting {unknown[0]!r}")
    try:
        return PARTS[name](**settings)
    except (FastgenError, TypeError) as error:
        raise FastgenError(f"plan: {name}: {error}") from error
