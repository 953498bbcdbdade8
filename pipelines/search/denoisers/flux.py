"""FLUX.1: schnell, dev, and models without guidance distillation with true guidance."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor

from fastgen.drafters.targets.base import unit_range
from fastgen.pipelines.search.denoisers.base import defaults_of, register_denoiser
from fastgen.pipelines.search.denoisers.guided import GuidedFlowDenoiser

__all__ = ["FluxDenoiser"]

_DEFAULTS = defaults_of(FluxPipeline)


@register_denoiser("FluxPipeline")
class FluxDenoiser(GuidedFlowDenoiser):
    """`FluxPipeline`; latents are packed, [k, tokens, 4 channels].

    What its own call (`StockDenoiser`) cannot: samples of several prompts and times share a forward pass, small
    decoders preview the packed latents, and sizes that the pipeline would round are refused.

    As in the pipeline, `guidance_scale` is the number that guidance-distilled models read (others do not), and
    `extra` may have `true_cfg_scale`, which with a negative prompt turns true guidance on, and `max_sequence_length`.
    """

    def prepare(self) -> None:
        pipe = self.pipe
        asked = self.ask(_DEFAULTS, "true_cfg_scale", "max_sequence_length", longest=512)
        self.size(asked, pipe.default_sample_size * pipe.vae_scale_factor, pipe.vae_scale_factor * 2)
        self.true_guidance(asked)
        self.distilled = asked["guidance_scale"] if pipe.transformer.config.guidance_embeds else None
        steps, multiple = asked["num_inference_steps"], pipe.vae_scale_factor * 2
        mu = self.shift((self.height // multiple) * (self.width // multiple))
        if pipe.scheduler.config.get("use_flow_sigmas"):
            self.times = self.schedule(steps, mu=mu)
        else:
            self.times = self.schedule(steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        self.embeds, self.pooled, self.text_ids = pipe.encode_prompt(
            [*self.prompts, *self.negatives()],
            device=self.device,
            max_sequence_length=asked["max_sequence_length"],
        )
        self.image_ids = self._latents(None, torch.empty(0))[1]

    def _latents(self, generator: torch.Generator | None, latents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Noise [1, tokens, 4 channels] or the given latents, and the positions [tokens, 3] of the tokens."""
        channels = self.pipe.transformer.config.in_channels // 4
        latents, ids = self.pipe.prepare_latents(
            1, channels, self.height, self.width, self.embeds.dtype, self.device, generator, latents
        )
        return latents, ids

    def noise(self, generator: torch.Generator) -> Tensor:
        return self._latents(generator, None)[0].float()

    def forward(self, latents: Tensor, times: Tensor, rows: Tensor) -> Tensor:
        guidance = None
        if self.distilled is not None:
            guidance = torch.full((len(latents),), float(self.distilled), device=latents.device)
        out: Tensor = self.pipe.transformer(
            hidden_states=latents.to(self.dtype),
            timestep=self.clock(times).to(self.dtype) / 1000,
            guidance=guidance,
            pooled_projections=self.pooled[rows],
            encoder_hidden_states=self.embeds[rows],
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        return out.float()

    def unpacked(self, latents: Tensor) -> Tensor:
        grid: Tensor = self.pipe._unpack_latents(latents, self.height, self.width, self.pipe.vae_scale_factor)
        return grid

    def decode(self, grid: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = grid.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return unit_range(pixels)
