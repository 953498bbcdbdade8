"""Noise levels of schedulers of diffusers, and what a model's output says at them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from torch import Tensor

from fastgen.errors import FastgenError
from fastgen.pipelines.search.interpolants import Factor, Interpolant, Level, Linear, Prediction, Tabulated

__all__ = ["flow_levels", "noise_levels", "noise_prediction"]

_PREDICTIONS = {
    "epsilon": Prediction.of_noise,
    "v_prediction": Prediction.of_v,
    "sample": Prediction.of_clean,
}


def flow_levels(scheduler: Any, steps: int) -> tuple[Interpolant, list[float], Level]:
    """Interpolant, times and the level at which the pipeline decodes, of the last `steps` steps of a flow's schedule.

    Raises:
        FastgenError: the model is evaluated more than once a step.
    """
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    if len(scheduler.timesteps) != len(sigmas) - 1:
        name = type(scheduler).__name__
        raise FastgenError(f"scheduler: {name} evaluates its model more than once a step")
    levels = sigmas[len(sigmas) - 1 - steps :]
    return Linear(), levels[:-1], Level(1.0 - levels[-1], levels[-1])


def noise_levels(scheduler: Any, timesteps: Sequence[float] | Tensor) -> tuple[Interpolant, list[float], Level]:
    """The same of a model of discrete timesteps; times are its timesteps.

    Args:
        scheduler: after `set_timesteps`.
        timesteps: those of its schedule that the pipeline takes (the last ones).

    Raises:
        FastgenError: it predicts something unknown, or its timesteps leave the model's range.
    """
    times, kind = [float(t) for t in timesteps], scheduler.config.prediction_type
    if kind not in _PREDICTIONS:
        raise FastgenError(
            f"scheduler: prediction_type {kind!r} of {type(scheduler).__name__} is not supported, needs one of "
            f"{', '.join(_PREDICTIONS)}"
        )
    if isinstance(scheduler, EulerDiscreteScheduler):
        sigmas = [float(sigma) for sigma in scheduler.sigmas[-1 - len(times) :]]
        return Tabulated.of(times, [1.0] * len(times), sigmas[:-1]), times, Level(1.0, sigmas[-1])
    levels = [_preserving(float(product)) for product in scheduler.alphas_cumprod]
    steps = len(scheduler.timesteps)
    if times and times[0] >= len(levels):
        raise FastgenError(f"num_inference_steps: {steps} is not allowed, the model has {len(levels)} timesteps")
    final = Level(1.0, 0.0)
    if times and isinstance(scheduler, DDIMScheduler | CogVideoXDDIMScheduler):
        before = int(times[-1]) - len(levels) // steps
        final = levels[before] if before >= 0 else _preserving(float(scheduler.final_alpha_cumprod))
    return Tabulated({float(t): level for t, level in enumerate(levels)}), times, final


def noise_prediction(scheduler: Any, given: Tensor, output: Tensor, alpha: Factor, sigma: Factor) -> Prediction:
    """The prediction of a model of discrete timesteps, clipped as its scheduler does.

    Args:
        given: [k, …] samples of unit variance, as the model reads them.
        output: [k, …] of the model.
        alpha, sigma: their levels in these coordinates, alpha^2 + sigma^2 = 1.
    """
    config = scheduler.config
    said = _PREDICTIONS[config.prediction_type](given, output, alpha, sigma)
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
