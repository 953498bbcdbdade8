"""Adapters of models that were trained on discrete timesteps and predict noise, v or the clean sample."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastgen.checks import check_integer
from fastgen.pipelines.schema import SCHEMA
from fastgen.pipelines.search.denoisers.base import Denoiser
from fastgen.pipelines.search.denoisers.schedules import noise_levels, noise_prediction
from fastgen.pipelines.search.interpolants import Prediction
from fastgen.pipelines.search.schedulers import noise_scheduler, timesteps_of

__all__ = ["NoiseDenoiser", "check_clip_skip", "checked"]


def checked(name: str, value: Any, default: Any, kind: str | None = None) -> Any:
    """The value, or the default where it is None.

    Args:
        name: of the argument.
        kind: its name in `fastgen.pipelines.schema.SCHEMA`; None: the same.

    Raises:
        ValueError: a value that no pipeline can take.
    """
    if value is None:
        return default
    SCHEMA[kind or name].check(name, value)
    return value


def check_clip_skip(value: Any, *encoders: Any) -> int | None:
    """How many layers of the CLIP text encoders are skipped.

    Raises:
        FastgenError: no number of layers that they have.
    """
    layers = [encoder.config.num_hidden_layers for encoder in encoders if encoder is not None]
    return None if value is None else check_integer("clip_skip", value, 0, min(layers) - 1 if layers else None)


class NoiseDenoiser(Denoiser):
    """A model of discrete timesteps; an adapter gives `output` in place of `evaluate`.

    With a `DDIMScheduler` or a `DDPMScheduler` samples are in variance-preserving coordinates, with an
    `EulerDiscreteScheduler` in variance-exploding ones (alpha = 1). Other schedulers keep a history or draw noise of
    their own, which a search cannot branch: a `DDIMScheduler` of the same configuration takes their place. Times are
    the model's timesteps. Where these are unevenly spaced (`timestep_spacing` "linspace", say), diffusers' DDIM steps
    to levels a little beside those at which it evaluates next; a search steps to these.

    Attributes:
        drawn: in which type the pipeline draws its noise; samples are float32.
    """

    drawn: torch.dtype
    _shape: tuple[int, ...]

    def schedule(self, steps: int) -> None:
        """Set `interpolant`, `times` and `final` after the pipeline's scheduler.

        Raises:
            ValueError: a scheduler of no noise model, or too many steps.
        """
        scheduler = noise_scheduler(self.pipe.scheduler)
        trained = scheduler.config.num_train_timesteps
        if steps > trained:
            raise ValueError(f"num_inference_steps: {steps} is not allowed, the model has {trained} timesteps")
        timesteps_of(scheduler, steps)
        self.scheduler, self.clock = scheduler, scheduler.timesteps.dtype
        self.interpolant, self.times, self.final = noise_levels(scheduler, scheduler.timesteps)
        self.start = float(scheduler.init_noise_sigma)

    def noise(self, generator: torch.Generator) -> Tensor:
        latents: Tensor = randn_tensor(self._shape, generator=generator, device=self.device, dtype=self.drawn)
        return latents.float() * self.start

    @abstractmethod
    def output(self, latents: Tensor, clock: Tensor, which: Tensor) -> Tensor:
        """What the model says [k, C, H, W], guided, of variance-preserving latents at timesteps [k]."""

    def evaluate(self, latents: Tensor, times: Tensor, which: Tensor) -> Prediction:
        levels = [self.interpolant.level(t) for t in times.tolist()]
        # The model reads samples of unit variance, whatever the sampler's coordinates are.
        scales = [math.hypot(level.alpha, level.sigma) for level in levels]
        scale = _column(scales, latents)
        alpha = _column([level.alpha / size for level, size in zip(levels, scales, strict=True)], latents)
        sigma = _column([level.sigma / size for level, size in zip(levels, scales, strict=True)], latents)
        given = latents / scale
        said = self.output(given, times.to(self.clock), which).to(latents)
        return noise_prediction(self.scheduler, given, said, alpha, sigma)


def _column(values: list[float], like: Tensor) -> Tensor:
    """[k, 1, …] beside latents [k, …]."""
    return torch.tensor(values, dtype=torch.float64).to(like).view(-1, *[1] * (like.ndim - 1))
