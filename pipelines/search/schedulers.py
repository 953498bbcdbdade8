"""Schedulers as a search takes them: as they are, with their steps replaced and reported, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from fastgen.accounting import note_path
from fastgen.errors import FastgenError

__all__ = ["check_times", "flow_scheduler", "is_flow", "noise_scheduler", "timesteps_of"]

#: Solvers of the ODE (some of them with noise) with the noise levels of any diffusion model: their steps need a
#: history or noise of their own, which a search cannot branch.
_SOLVERS = {
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
}
#: The same, of models of discrete noise levels only.
_NOISE_SOLVERS = _SOLVERS | {
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
}

_REASON = "a search branches, and {} has a history or noise of its own, which cannot"


def is_flow(scheduler: Any) -> bool:
    """Whether it is of a flow: x = (1 - sigma) x_0 + sigma eps, and the model predicts eps - x_0."""
    return type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas"))


def noise_scheduler(scheduler: Any) -> Any:
    """A copy of the scheduler of a model of discrete noise levels, or the DDIM scheduler that takes its place.

    Raises:
        FastgenError: names the scheduler and says why a search cannot follow it.
    """
    name = type(scheduler).__name__
    if _steps_as(scheduler, DDIMScheduler, CogVideoXDDIMScheduler, DDPMScheduler, EulerDiscreteScheduler):
        note_path("scheduler", name)
        return copy.deepcopy(scheduler)
    flow = scheduler.config.get("use_flow_sigmas") and scheduler.config.get("prediction_type") != "flow_prediction"
    if name not in _NOISE_SOLVERS or flow:
        raise FastgenError(
            f"scheduler: {name} cannot be searched with this model: it is of a flow, of another kind of model, or its "
            "steps are not those of a diffusion ODE; needs e.g. DDIMScheduler"
        )
    # Clipping is DDIM's default and no other scheduler's; latents are not meant to be clipped.
    clip = scheduler.config.get("clip_sample", False)
    try:
        found = DDIMScheduler.from_config(scheduler.config, clip_sample=clip)
    except NotImplementedError as error:
        raise FastgenError(f"scheduler: {name} has noise levels that DDIMScheduler has not: {error}") from error
    note_path("scheduler", "DDIM", _REASON.format(name))
    return found


def flow_scheduler(scheduler: Any) -> Any:
    """A copy of the scheduler of a flow, of which a search takes the noise levels, and Euler steps between them.

    Raises:
        FastgenError: names the scheduler and says why a search cannot follow it.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if _steps_as(scheduler, FlowMatchEulerDiscreteScheduler):
        for option in ("invert_sigmas", "stochastic_sampling"):
            if config.get(option):
                raise FastgenError(
                    f"scheduler: {name} with {option} cannot be searched; take "
                    f"{name}.from_config(scheduler.config, {option}=False)"
                )
        note_path("scheduler", name)
    elif name in _SOLVERS and config.get("use_flow_sigmas"):
        if config.get("prediction_type") != "flow_prediction":
            raise FastgenError(
                f"scheduler: {name} with use_flow_sigmas and prediction_type {config.get('prediction_type')!r} cannot "
                "be searched; take prediction_type='flow_prediction'"
            )
        if config.get("final_sigmas_type", "zero") != "zero":
            raise FastgenError(f"scheduler: {name} needs final_sigmas_type 'zero' in a search")
        note_path("scheduler", "Euler", _REASON.format(name))
    else:
        raise FastgenError(
            f"scheduler: {name} is not one of a flow that a search can follow; needs "
            f"FlowMatchEulerDiscreteScheduler, or a solver with use_flow_sigmas: {', '.join(sorted(_SOLVERS))}"
        )
    return copy.deepcopy(scheduler)


def _steps_as(scheduler: Any, *kinds: type) -> bool:
    """Whether it is one of these; a derived class with its own steps is not."""
    return any(getattr(type(scheduler), "step", None) is kind.step for kind in kinds)  # type: ignore[attr-defined]


def timesteps_of(scheduler: Any, steps: int, **arguments: Any) -> None:
    """`set_timesteps`, with an error that names the scheduler.

    Raises:
        FastgenError: it does not take this number of steps, or these arguments.
    """
    count = {} if "sigmas" in arguments else {"num_inference_steps": steps}
    try:
        scheduler.set_timesteps(**count, **arguments, device="cpu")
    except (TypeError, ValueError, IndexError, NotImplementedError) as error:
        name = type(scheduler).__name__
        raise FastgenError(f"scheduler: {name} gives no {steps} steps for this pipeline: {error}") from error


def check_times(scheduler: Any, times: Sequence[float]) -> None:
    """Times of a trajectory fall, strictly.

    Raises:
        FastgenError: they do not; names the scheduler.
    """
    if not times or not all(before > after for before, after in zip(times, times[1:], strict=False)):
        raise FastgenError(
            f"scheduler: {type(scheduler).__name__} has noise levels that do not fall from step to step "
            f"({len(times)} steps), and a search cannot follow it; take fewer steps or another scheduler"
        )
