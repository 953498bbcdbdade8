"""What a search reads from a scheduler of diffusers: noise levels, and clean samples from the model's output."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from fastgen.accounting import note_path
from fastgen.pipelines.search.interpolants import Interpolant, Level, Linear, Prediction, Tabulated

__all__ = ["is_flow", "levels_of", "prediction_of", "searchable"]

_PREDICTIONS = {
    "epsilon": Prediction.of_noise,
    "v_prediction": Prediction.of_v,
    "sample": Prediction.of_clean,
}


#: Schedulers whose deterministic step is DDIM's.
_DDIM = DDIMScheduler | CogVideoXDDIMScheduler


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is one of a flow: x = (1 - sigma) x_0 + sigma eps, and the model predicts eps - x_0."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or bool(scheduler.config.get("use_flow_sigmas"))


def searchable(scheduler: Any) -> Any:
    """A copy of a scheduler, or the DDIM scheduler that takes its place.

    Raises:
        ValueError: a scheduler whose noise levels a search cannot read.
    """
    if is_flow(scheduler) or isinstance(scheduler, _DDIM | DDPMScheduler | EulerDiscreteScheduler):
        return copy.deepcopy(scheduler)
    name = type(scheduler).__name__
    if "beta_start" not in scheduler.config:
        raise ValueError(f"scheduler: a search cannot read the noise levels of {name}")
    note_path("scheduler", "DDIM", f"a search branches, and {name} has a history or noise of its own, which cannot")
    # Clipping is DDIM's default and no other scheduler's; latents are not meant to be clipped.
    clip = scheduler.config.get("clip_sample", False)
    return DDIMScheduler.from_config(scheduler.config, clip_sample=clip)


def levels_of(scheduler: Any, timesteps: Sequence[float] | Tensor) -> tuple[Interpolant, list[float], Level]:
    """Interpolant, times and the level at which the pipeline decodes, of a scheduler with its timesteps set.

    Args:
        scheduler: after `set_timesteps`.
        timesteps: those of its schedule that the pipeline takes (the last ones).

    Raises:
        ValueError: it predicts something unknown, its timesteps do not fall, or they leave the model's range.
    """
    times = [float(t) for t in timesteps]
    name = type(scheduler).__name__
    if not times or any(after >= before for before, after in zip(times, times[1:], strict=False)):
        raise ValueError(f"scheduler: the timesteps of {name} do not fall (inverted or repeated)")
    if is_flow(scheduler):
        sigmas = [float(sigma) for sigma in scheduler.sigmas]
        if len(scheduler.timesteps) != len(sigmas) - 1:
            raise ValueError(f"scheduler: {name} evaluates its model more than once a step")
        levels = sigmas[len(sigmas) - 1 - len(times) :]
        return Linear(), levels[:-1], Level(1.0 - levels[-1], levels[-1])
    if scheduler.config.prediction_type not in _PREDICTIONS:
        kinds = ", ".join(_PREDICTIONS)
        raise ValueError(f"prediction_type: {scheduler.config.prediction_type!r} is not supported, there are {kinds}")
    if isinstance(scheduler, EulerDiscreteScheduler):
        sigmas = [float(sigma) for sigma in scheduler.sigmas[-1 - len(times) :]]
        return Tabulated.of(times, [1.0] * len(times), sigmas[:-1]), times, Level(1.0, sigmas[-1])
    table = [_preserving(float(product)) for product in scheduler.alphas_cumprod]
    if times[0] >= len(table):
        steps = len(scheduler.timesteps)
        raise ValueError(f"num_inference_steps: {steps} is not allowed, the model has {len(table)} timesteps")
    final = Level(1.0, 0.0)
    if isinstance(scheduler, _DDIM):
        before = int(times[-1]) - len(table) // scheduler.num_inference_steps
        final = table[before] if before >= 0 else _preserving(float(scheduler.final_alpha_cumprod))
    return Tabulated({float(t): level for t, level in enumerate(table)}), times, final


def prediction_of(scheduler: Any, sample: Tensor, output: Tensor, level: Level) -> Prediction:
    """What a model's output says, as the scheduler reads it.

    Args:
        sample: [k, …] in the scheduler's coordinates.
        output: [k, …] of the model.
        level: of the samples.
    """
    if is_flow(scheduler):
        return Prediction.of_velocity(sample, output, level.alpha, level.sigma)
    # The model reads samples of unit variance, whatever the scheduler's coordinates are.
    scale = math.hypot(level.alpha, level.sigma)
    given, alpha, sigma = sample / scale, level.alpha / scale, level.sigma / scale
    said = _PREDICTIONS[scheduler.config.prediction_type](given, output, alpha, sigma)
    config = scheduler.config
    if not isinstance(scheduler, DDIMScheduler | DDPMScheduler):
        return said
    if config.thresholding:
        clean = scheduler._threshold_sample(said.clean)
    elif config.clip_sample:
        clean = said.clean.clamp(-config.clip_sample_range, config.clip_sample_range)
    else:
        return said
    # DDIM keeps the noise that the model predicted; DDPM's posterior holds what is left of the clipped sample.
    if isinstance(scheduler, DDPMScheduler):
        return Prediction.of_clean(given, clean, alpha, sigma)
    return Prediction(clean, said.noise)


def _preserving(product: float) -> Level:
    """The level of a cumulative product of alphas."""
    return Level(math.sqrt(product), math.sqrt(1.0 - product))
