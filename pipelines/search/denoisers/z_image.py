"""Z-Image, with and without dynamic chunking (`DCZImagePipeline`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ZImagePipeline
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas
from torch import Tensor

from fastgen.drafters.targets.base import unit_range
from fastgen.models.elastic import ElasticModelMixin
from fastgen.pipelines.dc_z_image import DCZImagePipeline
from fastgen.pipelines.search.denoisers.base import FlowDenoiser, Settings, register_denoiser
from fastgen.pipelines.search.denoisers.elastic import ElasticDenoiser
from fastgen.pipelines.search.denoisers.stock import StockDenoiser
from fastgen.pipelines.stock_arguments import defaults_of

__all__ = ["ZImageDenoiser"]

_DEFAULTS = defaults_of(ZImagePipeline)


@register_denoiser("ZImagePipeline")
class ZImageDenoiser(ElasticDenoiser, FlowDenoiser):
    """`ZImagePipeline`, true CFG in one forward pass; with dynamic chunking its knobs are in `settings.extra`.

    It stays because samples of several prompts and times share a forward pass: on `tiny` four of them take 0.77 of the
    time of the pipeline's own call (one CPU thread; of one sample or one prompt the times are the same within 4 %).
    Further arguments of the pipeline's call go to the call itself.
    """

    guided_above = 0.0

    def __new__(cls, pipe: Any, prompts: Sequence[Any], settings: Settings) -> Any:
        if set(settings.extra) & defaults_of(type(pipe)).keys() and not isinstance(
            pipe.transformer, ElasticModelMixin
        ):
            return StockDenoiser(pipe, prompts, settings)
        return super().__new__(cls)

    def prepare(self) -> None:
        pipe, settings = self.pipe, self.settings
        self.height, self.width = settings.height or 1024, settings.width or 1024
        multiple = pipe.vae_scale_factor * 2
        for name, size in (("height", self.height), ("width", self.width)):
            if size % multiple:
                raise ValueError(f"{name}: {size} is not allowed, needs a multiple of {multiple}")
        sides = self.height // pipe.vae_scale_factor, self.width // pipe.vae_scale_factor
        self.prepare_knobs(sides[0] * sides[1], overrides=isinstance(pipe, DCZImagePipeline))
        self.scale = _DEFAULTS["guidance_scale"] if settings.guidance_scale is None else settings.guidance_scale
        guided = self.scale > self.guided_above
        self.forwards = 2 if guided else 1
        steps = settings.num_inference_steps or _DEFAULTS["num_inference_steps"]
        config = pipe.scheduler.config
        mu = calculate_shift(
            (self.height // multiple) * (self.width // multiple),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        self.times = self.schedule(steps, sigmas=get_default_z_image_sigmas(steps), mu=mu)
        self.cond, uncond = pipe.encode_prompt(
            list(self.prompts),
            do_classifier_free_guidance=guided,
            negative_prompt=settings.negatives(len(self.prompts)),
            device=self.device,
        )
        self.uncond: list[Tensor] = uncond or []

    def noise(self, generator: torch.Generator) -> Tensor:
        channels = self.pipe.transformer.in_channels
        return self.pipe.prepare_latents(
            1, channels, self.height, self.width, torch.float32, self.device, generator, None
        )

    def velocity(self, latents: Tensor, times: Tensor, which: Tensor) -> Tensor:
        # The model's time is 1 at the data, and so is the sign of what it predicts.
        clock = (1 - times).to(latents)
        rows = which.tolist()
        given = list(latents.to(self.pipe.transformer.dtype).unsqueeze(2))
        embeds = [self.cond[row] for row in rows]
        if not self.uncond:
            return -self._forward(given, clock, embeds)
        out = self._forward(given * 2, clock.repeat(2), embeds + [self.uncond[row] for row in rows])
        cond, uncond = out.chunk(2)
        return -(cond + self.scale * (cond - uncond))

    def _forward(self, latents: list[Tensor], clock: Tensor, embeds: list[Tensor]) -> Tensor:
        samples = len(latents) // self.forwards
        out = self.pipe.transformer(latents, clock, embeds, return_dict=False, **self.budget(samples))[0]
        return torch.stack([row.float() for row in out]).squeeze(2)

    def decode(self, grid: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = grid.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return unit_range(pixels)
