"""Qwen-Image."""

from __future__ import annotations

import logging

import numpy as np
import torch
from diffusers import QwenImagePipeline
from torch import Tensor

from fastgen.drafters.targets.base import unit_range
from fastgen.pipelines.search.denoisers.base import defaults_of, register_denoiser
from fastgen.pipelines.search.denoisers.guided import GuidedFlowDenoiser

__all__ = ["QwenImageDenoiser"]

_DEFAULTS = defaults_of(QwenImagePipeline)

logger = logging.getLogger(__name__)


@register_denoiser("QwenImagePipeline")
class QwenImageDenoiser(GuidedFlowDenoiser):
    """`QwenImagePipeline`; latents are packed, [k, tokens, 4 channels].

    What its own call (`StockDenoiser`) cannot: samples of several prompts and times share a forward pass, small
    decoders preview the packed latents, and sizes that the pipeline would round are refused.

    As in the pipeline, guidance needs a negative prompt, and `extra` may have its `true_cfg_scale`, and
    `max_sequence_length`; `guidance_scale` is what a guidance-distilled model reads, and others do not.
    """

    def prepare(self) -> None:
        pipe = self.pipe
        asked = self.ask(_DEFAULTS, "true_cfg_scale", "max_sequence_length", longest=1024)
        multiple = pipe.vae_scale_factor * 2
        self.size(asked, pipe.default_sample_size * pipe.vae_scale_factor, multiple)
        self.true_guidance(asked)
        self.distilled = self._distilled(asked["guidance_scale"])
        self.grid = (self.height // multiple, self.width // multiple)
        steps = asked["num_inference_steps"]
        mu = self.shift(self.grid[0] * self.grid[1])
        self.times = self.schedule(steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        self.embeds, mask = pipe.encode_prompt(
            [*self.prompts, *self.negatives()],
            device=self.device,
            max_sequence_length=asked["max_sequence_length"],
        )
        if mask is None:
            mask = torch.ones(self.embeds.shape[:2], device=self.device)
        self.mask = mask.bool()
        self.lengths: list[int] = self.mask.sum(1).tolist()

    def _distilled(self, scale: float | None) -> float | None:
        """The guidance that the model reads.

        Raises:
            ValueError: it reads one and there is none.
        """
        if not self.pipe.transformer.config.guidance_embeds:
            if scale is not None:
                logger.warning("guidance_scale: ignored, this model is not guidance-distilled; see true_cfg_scale")
            return None
        if scale is None:
            raise ValueError("guidance_scale: a guidance-distilled model needs one")
        return scale

    def noise(self, generator: torch.Generator) -> Tensor:
        channels = self.pipe.transformer.config.in_channels // 4
        latents: Tensor = self.pipe.prepare_latents(
            1, channels, self.height, self.width, self.embeds.dtype, self.device, generator, None
        )
        return latents.float()

    def forward(self, latents: Tensor, times: Tensor, rows: Tensor) -> Tensor:
        lengths = [self.lengths[row] for row in rows.tolist()]
        # Attention without a mask has faster kernels, and the pipeline goes without one where nothing is padded.
        mask = self.mask[rows, : max(lengths)] if min(lengths) < max(lengths) else None
        guidance = None
        if self.distilled is not None:
            guidance = torch.full((len(latents),), float(self.distilled), device=latents.device)
        out: Tensor = self.pipe.transformer(
            hidden_states=latents.to(self.dtype),
            timestep=self.clock(times).to(self.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states_mask=mask,
            encoder_hidden_states=self.embeds[rows, : max(lengths)],
            img_shapes=[[(1, *self.grid)]] * len(latents),
            return_dict=False,
        )[0]
        return out.float()

    def guide(self, cond: Tensor, uncond: Tensor) -> Tensor:
        # Every token's velocity keeps the length that it has without guidance.
        guided = super().guide(cond, uncond)
        return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def unpacked(self, latents: Tensor) -> Tensor:
        grid: Tensor = self.pipe._unpack_latents(latents, self.height, self.width, self.pipe.vae_scale_factor)
        return grid

    def decode(self, grid: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = grid.to(vae.dtype)
        mean, std = (
            torch.tensor(values).to(latents).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        pixels: Tensor = vae.decode(latents * std + mean, return_dict=False)[0][:, :, 0]
        return unit_range(pixels)
