"""All parts of `accelerate`, by name."""

from __future__ import annotations

from dataclasses import fields

from fastgen.errors import FastgenError
from fastgen.pipelines.accelerate.attention import Attention, QuantizedAttention
from fastgen.pipelines.accelerate.bfloat16 import BFloat16
from fastgen.pipelines.accelerate.dbcache import DBCache
from fastgen.pipelines.accelerate.features import ChannelsLast, Compile, FewerSteps, Kernels, VaeSlicing, VaeTiling
from fastgen.pipelines.accelerate.guidance import Guidance
from fastgen.pipelines.accelerate.parallel import ContextParallel
from fastgen.pipelines.accelerate.part import Part
from fastgen.pipelines.accelerate.prompt_padding import PromptPadding
from fastgen.pipelines.accelerate.quantize import Quantize
from fastgen.pipelines.accelerate.solver import Solver
from fastgen.pipelines.accelerate.step_cache import StepCache
from fastgen.pipelines.accelerate.tail_drops import TailDrops
from fastgen.pipelines.accelerate.text_encoder import TextEncoder
from fastgen.pipelines.accelerate.token_stage import TokenStage

__all__ = [
    "PARTS",
    "Attention",
    "BFloat16",
    "ChannelsLast",
    "Compile",
    "ContextParallel",
    "DBCache",
    "FewerSteps",
    "Guidance",
    "Kernels",
    "Part",
    "PromptPadding",
    "Quantize",
    "QuantizedAttention",
    "Solver",
    "StepCache",
    "TailDrops",
    "TextEncoder",
    "TokenStage",
    "VaeSlicing",
    "VaeTiling",
    "made_part",
]

#: In the order in which they are turned on.
PARTS: dict[str, type[Part]] = {
    each.name: each
    for each in (
        Kernels,
        ChannelsLast,
        PromptPadding,
        Attention,
        QuantizedAttention,
        VaeSlicing,
        VaeTiling,
        BFloat16,
        Quantize,
        Compile,
        ContextParallel,
        TextEncoder,
        TokenStage,
        Solver,
        StepCache,
        DBCache,
        Guidance,
        TailDrops,
        FewerSteps,
    )
}


def made_part(name: object, settings: object) -> Part:
    """A part by its name in a plan.

    Raises:
        FastgenError: no part has that name, or it does not have such settings.
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
