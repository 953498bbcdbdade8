"""DiT, with and without dynamic chunking (`DCDiTPipeline`)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTPipeline
from torch import Tensor

from fastgen.checks import check_integer
from fastgen.pipelines.dc_dit import DCDiTPipeline
from fastgen.pipelines.search.denoisers.base import defaults_of, register_denoiser
from fastgen.pipelines.search.denoisers.elastic import ElasticDenoiser
from fastgen.pipelines.search.denoisers.noise_model import NoiseDenoiser, checked

__all__ = ["DiTDenoiser"]

_DEFAULTS = defaults_of(DiTPipeline)


@register_denoiser("DiTPipeline")
class DiTDenoiser(ElasticDenoiser, NoiseDenoiser):
    """`DiTPipeline`; prompts are classes, by number or by a name of `pipe.labels`.

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
        self.scale = checked("guidance_scale", settings.guidance_scale, _DEFAULTS["guidance_scale"])
        self.forwards = 2 if self.scale > self.guided_above else 1
        steps = checked("num_inference_steps", settings.num_inference_steps, _DEFAULTS["num_inference_steps"], "steps")
        self.schedule(steps)
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
