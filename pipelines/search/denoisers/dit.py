"""DiT, with and without dynamic chunking (`DCDiTPipeline`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import DiTPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastgen.checks import check_integer
from fastgen.pipelines.dc_dit import DCDiTPipeline
from fastgen.pipelines.schema import SCHEMA
from fastgen.pipelines.search.denoisers.base import register_denoiser
from fastgen.pipelines.search.denoisers.elastic import ElasticDenoiser
from fastgen.pipelines.search.denoisers.schedules import noise_levels, noise_prediction
from fastgen.pipelines.search.interpolants import Prediction
from fastgen.pipelines.search.schedulers import noise_scheduler, timesteps_of
from fastgen.pipelines.stock_arguments import defaults_of

__all__ = ["DiTDenoiser"]

_DEFAULTS = defaults_of(DiTPipeline)


@register_denoiser("DiTPipeline")
class DiTDenoiser(ElasticDenoiser):
    """`DiTPipeline`; prompts are classes, by number or by a name of `pipe.labels`.

    It has an adapter because its call draws its start noise itself and takes no latents.

    Guidance is on all latent channels, as in the pipeline. With dynamic chunking its knobs are in `settings.extra`.
    """

    guided_above = 1.0

    def prepare(self) -> None:
        pipe, settings = self.pipe, self.settings
        config = pipe.transformer.config
        self.channels, side = config.in_channels, config.sample_size
        pixels = side * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        for name in ("height", "width"):
            if getattr(settings, name) not in (None, pixels):
                raise ValueError(f"{name}: {getattr(settings, name)} is not allowed, the model draws {pixels}")
        if settings.negative_prompt is not None:
            raise ValueError("negative_prompt: a class-conditional model takes none")
        self.prepare_knobs(side * side, overrides=isinstance(pipe, DCDiTPipeline))
        self.scale = _checked("guidance_scale", settings.guidance_scale)
        self.forwards = 2 if self.scale > self.guided_above else 1
        steps = _checked("num_inference_steps", settings.num_inference_steps, "steps")
        self._schedule(steps)
        self._shape, self.drawn = (1, self.channels, side, side), pipe.transformer.dtype
        #: The unconditional class comes after the others; 1000 for models of ImageNet.
        self.none = int(config.get("num_classes") or config.get("num_embeds_ada_norm") or 1000)
        self.classes = torch.tensor([self._class(prompt) for prompt in self.prompts], device=self.device)

    def check_prompts(self) -> None:
        """Classes are checked by `_class`, which knows their names."""

    def _class(self, prompt: Any) -> int:
        labels = self.pipe.labels
        if isinstance(prompt, str):
            if prompt not in labels:
                raise ValueError(f"prompt: {prompt!r} is not the name of a class, see pipe.labels")
            return int(labels[prompt])
        return check_integer("prompt", prompt, 0, self.none)

    def _schedule(self, steps: int) -> None:
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
        latents: Tensor = randn_tensor(self.shape, generator=generator, device=self.device, dtype=self.drawn)
        return latents.float() * self.start

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

    def output(self, latents: Tensor, clock: Tensor, which: Tensor) -> Tensor:
        transformer, guided = self.pipe.transformer, self.forwards == 2
        given, labels = latents.to(transformer.dtype), self.classes[which.to(self.classes.device)]
        if guided:
            given, clock = given.repeat(2, 1, 1, 1), clock.repeat(2)
            labels = torch.cat([labels, torch.full_like(labels, self.none)])
        said = transformer(given, timestep=clock, class_labels=labels, **self.budget(len(latents))).sample
        if transformer.config.out_channels // 2 == self.channels:
            said = said[:, : self.channels]  # the rest is the learned sigma
        if not guided:
            return said.float()
        cond, uncond = said.float().chunk(2)
        return uncond + self.scale * (cond - uncond)

    def decode(self, grid: Tensor) -> Tensor:
        vae = self.pipe.vae
        pixels: Tensor = vae.decode(grid.to(vae.dtype) / vae.config.scaling_factor).sample
        return pixels.float().div(2).add(0.5).clamp(0, 1)


def _checked(name: str, value: Any, kind: str | None = None) -> Any:
    """The value, or the pipeline's default where it is None; `kind`: its name in `SCHEMA`."""
    if value is None:
        return _DEFAULTS[name]
    SCHEMA[kind or name].check(name, value)
    return value


def _column(values: list[float], like: Tensor) -> Tensor:
    """[k, 1, …] for latents [k, …]."""
    return torch.tensor(values, dtype=torch.float64).to(like).view(-1, *[1] * (like.ndim - 1))
