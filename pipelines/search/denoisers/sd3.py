"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from fastgen.drafters.targets.base import unit_range
from fastgen.pipelines.search.denoisers.base import defaults_of, register_denoiser
from fastgen.pipelines.search.denoisers.guided import GuidedFlowDenoiser

__all__ = ["StableDiffusion3Denoiser"]

_DEFAULTS = defaults_of(StableDiffusion3Pipeline)


@register_denoiser("StableDiffusion3Pipeline")
class StableDiffusion3Denoiser(GuidedFlowDenoiser):
    """`StableDiffusion3Pipeline`, guided where `guidance_scale` > 1; `extra` may have `max_sequence_length`.

    Guidance that skips layers is left out: it depends on the step, and samples here are at different ones.
    """

    guided_above = 1.0

    def prepare(self) -> None:
        pipe = self.pipe
        asked = self.ask(_DEFAULTS, "max_sequence_length", longest=512)
        multiple = pipe.vae_scale_factor * pipe.patch_size
        self.size(asked, pipe.default_sample_size * pipe.vae_scale_factor, multiple)
        self.scale = asked["guidance_scale"]
        self.forwards = 2 if self.scale > self.guided_above else 1
        negative = [asked["negative_prompt"] or ""] * (self.forwards - 1)
        self.embeds, _, self.pooled, _ = pipe.encode_prompt(
            [*self.prompts, *negative],
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=asked["max_sequence_length"],
        )
        shift: dict[str, Any] = {}
        if pipe.scheduler.config.get("use_dynamic_shifting"):
            tokens = (self.height // multiple) * (self.width // multiple)
            shift["mu"] = self.shift(tokens, max_shift=1.16)
        self.times = self.schedule(asked["num_inference_steps"], **shift)

    def noise(self, generator: torch.Generator) -> Tensor:
        channels = self.pipe.transformer.config.in_channels
        latents: Tensor = self.pipe.prepare_latents(
            1, channels, self.height, self.width, self.embeds.dtype, self.device, generator, None
        )
        return latents.float()

    def forward(self, latents: Tensor, times: Tensor, rows: Tensor) -> Tensor:
        out: Tensor = self.pipe.transformer(
            hidden_states=latents.to(self.dtype),
            timestep=self.clock(times),
            encoder_hidden_states=self.embeds[rows],
            pooled_projections=self.pooled[rows],
            return_dict=False,
        )[0]
        return out.float()

    def decode(self, grid: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = grid.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return unit_range(pixels)
