"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from fastgen.drafters.targets.base import unit_range
from fastgen.pipelines.search.denoisers.base import defaults_of, register_denoiser
from fastgen.pipelines.search.denoisers.guided import GuidedFlowDenoiser
from fastgen.pipelines.search.denoisers.noise_model import check_clip_skip

__all__ = ["StableDiffusion3Denoiser"]

_DEFAULTS = defaults_of(StableDiffusion3Pipeline)


@register_denoiser("StableDiffusion3Pipeline")
class StableDiffusion3Denoiser(GuidedFlowDenoiser):
    """`StableDiffusion3Pipeline`, guided where `guidance_scale` > 1; `extra` may have `max_sequence_length` and
    `clip_skip`.

    Guidance that skips layers is left out: it depends on the step, and samples here are at different ones.
    """

    guided_above = 1.0

    def prepare(self) -> None:
        pipe = self.pipe
        asked = self.ask(_DEFAULTS, "max_sequence_length", "clip_skip", longest=512)
        skip = check_clip_skip(asked["clip_skip"], pipe.text_encoder, pipe.text_encoder_2)
        multiple = pipe.vae_scale_factor * pipe.patch_size
        self.size(asked, pipe.default_sample_size * pipe.vae_scale_factor, multiple)
        self.scale = asked["guidance_scale"]
        self.forwards = 2 if self.scale > self.guided_above else 1
        shift: dict[str, Any] = {}
        if pipe.scheduler.config.get("use_dynamic_shifting"):
            tokens = (self.height // multiple) * (self.width // multiple)
            shift["mu"] = self.shift(tokens, max_shift=1.16)
        self.times = self.schedule(asked["num_inference_steps"], **shift)
        # As in the pipeline, `clip_skip` is of the prompts, not of negative ones.
        parts = [self._encode(self.prompts, asked, skip)]
        if negatives := self.negatives():
            parts.append(self._encode(negatives, asked, None))
        self.embeds, self.pooled = (torch.cat(rows) for rows in zip(*parts, strict=True))

    def _encode(self, texts: list[str], asked: dict[str, Any], skip: int | None) -> tuple[Tensor, Tensor]:
        """Embeddings [n, tokens, d] and pooled ones [n, d]."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            texts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            clip_skip=skip,
            max_sequence_length=asked["max_sequence_length"],
        )
        return embeds, pooled

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
