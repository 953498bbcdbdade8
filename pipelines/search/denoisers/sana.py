"""Sana."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SanaPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN
from torch import Tensor

from fastgen.checks import check_bool
from fastgen.drafters.targets.base import unit_range
from fastgen.errors import FastgenError
from fastgen.pipelines.search.denoisers.base import defaults_of, register_denoiser
from fastgen.pipelines.search.denoisers.guided import GuidedFlowDenoiser
from fastgen.pipelines.search.schedulers import flow_scheduler, timesteps_of

__all__ = ["SanaDenoiser"]

_DEFAULTS = defaults_of(SanaPipeline)
_EXTRA = ("max_sequence_length", "complex_human_instruction", "clean_caption", "use_resolution_binning")
#: Sizes that a model was trained for, by the sample size of its transformer.
_SIZES = {
    16: ASPECT_RATIO_512_BIN,
    32: ASPECT_RATIO_1024_BIN,
    64: ASPECT_RATIO_2048_BIN,
    128: ASPECT_RATIO_4096_BIN,
}


@register_denoiser("SanaPipeline")
class SanaDenoiser(GuidedFlowDenoiser):
    """`SanaPipeline`, guided where `guidance_scale` > 1.

    What its own call (`StockDenoiser`) cannot: samples of several prompts and times share a forward pass, previews are
    cut to the size of the picture, and the side on which the tokenizer pads stays the user's.

    `extra` may have its `max_sequence_length`, `complex_human_instruction`, `clean_caption` and
    `use_resolution_binning`. The pipeline comes with a DPM solver for flows; its sigmas are the times here, and the
    deterministic path is then Euler's on the same sigmas, not the solver's.
    """

    guided_above = 1.0

    def prepare(self) -> None:
        asked = self.ask(_DEFAULTS, *_EXTRA)
        for name in ("clean_caption", "use_resolution_binning"):
            check_bool(name, asked[name])
        instruction = asked["complex_human_instruction"]
        if instruction is not None and not (
            isinstance(instruction, list) and all(isinstance(line, str) for line in instruction)
        ):
            raise FastgenError(f"complex_human_instruction: {instruction!r} is not allowed, needs a list of texts")
        self._resize(asked)
        self._schedule(asked["num_inference_steps"])
        self.scale = asked["guidance_scale"]
        self.forwards = 2 if self.scale > self.guided_above else 1
        self.embeds, self.mask = self._encode(self.prompts, asked, instruction)
        if self.forwards == 2:
            embeds, mask = self._encode(self.negatives(), asked, None)
            self.embeds, self.mask = torch.cat([self.embeds, embeds]), torch.cat([self.mask, mask])

    def _schedule(self, steps: int) -> None:
        """Set `times`, and `stamps`, the model's timesteps at them, which the solver rounds."""
        scheduler = flow_scheduler(self.pipe.scheduler)
        timesteps_of(scheduler, steps)
        self.times = [float(sigma) for sigma in scheduler.sigmas[:-1]]
        self.stamps: dict[float, float] = dict(zip(self.times, scheduler.timesteps.tolist(), strict=True))

    def clock(self, times: Tensor) -> Tensor:
        trained = self.pipe.scheduler.config.num_train_timesteps
        stamps = [self.stamps.get(t, t * trained) for t in times.tolist()]
        return torch.tensor(stamps, dtype=torch.float32, device=self.device)

    def _resize(self, asked: dict[str, Any]) -> None:
        """Set `height` and `width`, and `cut`, to which pictures of these are resized; None leaves them."""
        self.cut: tuple[int, int] | None = None
        if asked["use_resolution_binning"]:
            sample = self.pipe.transformer.config.sample_size
            if sample not in _SIZES:
                raise ValueError(f"use_resolution_binning: there are no sizes for models of sample size {sample}")
            self.size(asked, 1024, 1)
            self.cut = self.height, self.width
            fitting = self.pipe.image_processor.classify_height_width_bin(*self.cut, ratios=_SIZES[sample])
            asked["height"], asked["width"] = fitting
        self.size(asked, 1024, 32)

    def _encode(self, texts: list[str], asked: dict[str, Any], instruction: list[str] | None) -> tuple[Tensor, Tensor]:
        """Embeddings [n, tokens, d] and mask [n, tokens]."""
        tokenizer = self.pipe.tokenizer
        side = tokenizer.padding_side
        try:
            embeds, mask, _, _ = self.pipe.encode_prompt(
                texts,
                do_classifier_free_guidance=False,
                device=self.device,
                clean_caption=asked["clean_caption"],
                max_sequence_length=asked["max_sequence_length"],
                complex_human_instruction=instruction,
            )
        finally:
            # The pipeline sets it and leaves it.
            tokenizer.padding_side = side
        return embeds, mask

    def noise(self, generator: torch.Generator) -> Tensor:
        channels = self.pipe.transformer.config.in_channels
        latents: Tensor = self.pipe.prepare_latents(
            1, channels, self.height, self.width, torch.float32, self.device, generator, None
        )
        return latents

    def forward(self, latents: Tensor, times: Tensor, rows: Tensor) -> Tensor:
        transformer = self.pipe.transformer
        out: Tensor = transformer(
            latents.to(self.dtype),
            encoder_hidden_states=self.embeds[rows].to(self.dtype),
            encoder_attention_mask=self.mask[rows],
            timestep=self.clock(times) * transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        if transformer.config.out_channels // 2 == latents.shape[1]:
            out = out.chunk(2, dim=1)[0]  # the rest is a variance
        return out.float()

    def decode(self, grid: Tensor) -> Tensor:
        vae = self.pipe.vae
        pixels: Tensor = vae.decode(grid.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        if self.cut:
            share = pixels.shape[-2] / self.height
            height, width = (round(side * share) for side in self.cut)
            pixels = self.pipe.image_processor.resize_and_crop_tensor(pixels, width, height)
        return unit_range(pixels)
