"""Stable Diffusion (1.x, 2.x) and Stable Diffusion XL."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from fastgen.checks import check_number
from fastgen.pipelines.search.denoisers.base import defaults_of, register_denoiser
from fastgen.pipelines.search.denoisers.noise_model import NoiseDenoiser, check_clip_skip, checked

__all__ = ["StableDiffusionDenoiser", "StableDiffusionXLDenoiser"]


@contextmanager
def _text_model(encoder: Any) -> Iterator[None]:
    """For `clip_skip` diffusers reads `encoder.text_model`, which CLIP text models of newer transformers are
    themselves."""
    if hasattr(encoder, "text_model") or not hasattr(encoder, "final_layer_norm"):
        yield
        return
    encoder.__dict__["text_model"] = encoder  # not as a submodule of itself
    try:
        yield
    finally:
        encoder.__dict__.pop("text_model", None)


@register_denoiser("StableDiffusionPipeline")
class StableDiffusionDenoiser(NoiseDenoiser):
    """`StableDiffusionPipeline`; `settings.extra` takes its `guidance_rescale` and `clip_skip`.

    What its own call (`StockDenoiser`) cannot: samples of several prompts and times share a forward pass, and
    `clip_skip` works with text encoders of newer transformers.

    A safety checker of the pipeline sees every picture, so that the verifier scores what the user would be given.
    """

    defaults: ClassVar[dict[str, Any]] = defaults_of(StableDiffusionPipeline)
    extras: ClassVar[tuple[str, ...]] = ("guidance_rescale", "clip_skip")

    def prepare(self) -> None:
        pipe, settings, config = self.pipe, self.settings, self.pipe.unet.config
        unknown = [name for name in settings.extra if name not in self.extras]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: a search of {type(pipe).__name__} takes no such argument")
        self.height, self.width = self._sizes()
        self.scale = checked("guidance_scale", settings.guidance_scale, self.defaults["guidance_scale"])
        # A distilled model reads the scale itself.
        self.distilled = config.time_cond_proj_dim is not None
        self.forwards = 2 if self.scale > 1 and not self.distilled else 1
        rescale = settings.extra.get("guidance_rescale", self.defaults["guidance_rescale"])
        self.rescale = check_number("guidance_rescale", rescale, 0, 1)
        skip = check_clip_skip(
            settings.extra.get("clip_skip"), pipe.text_encoder, getattr(pipe, "text_encoder_2", None)
        )
        steps = settings.num_inference_steps
        self.schedule(checked("num_inference_steps", steps, self.defaults["num_inference_steps"], "steps"))
        self.encode({"negative_prompt": settings.negatives(len(self.prompts)), "clip_skip": skip})
        factor = pipe.vae_scale_factor
        self._shape = (1, config.in_channels, self.height // factor, self.width // factor)

    def _sizes(self) -> list[int]:
        """Height and width."""
        side = self.pipe.unet.config.sample_size
        sides = (side, side) if isinstance(side, int) else tuple(side)
        factor, found = self.pipe.vae_scale_factor, []
        multiple = math.lcm(8, factor)
        for name, default in zip(("height", "width"), sides, strict=True):
            size = checked(name, getattr(self.settings, name), default * factor)
            if size % multiple:
                raise ValueError(f"{name}: {size} is not allowed, needs a multiple of {multiple}")
            found.append(size)
        return found

    def encode(self, how: dict[str, Any]) -> None:
        """Set `cond` and `uncond` [P, L, D], and `drawn`."""
        with _text_model(self.pipe.text_encoder):
            cond, uncond = self.pipe.encode_prompt(list(self.prompts), self.device, 1, self.forwards == 2, **how)
        self.cond, self.uncond, self.drawn = cond, uncond, cond.dtype

    def output(self, latents: Tensor, clock: Tensor, which: Tensor) -> Tensor:
        unet, which = self.pipe.unet, which.to(self.cond.device)
        guided = self.forwards == 2
        given, embeds = latents.to(unet.dtype), self.cond[which]
        if guided:
            given, clock = given.repeat(2, 1, 1, 1), clock.repeat(2)
            embeds = torch.cat([self.uncond[which], embeds])
        said: Tensor = unet(
            given,
            clock,
            encoder_hidden_states=embeds,
            timestep_cond=self._scale_embedding(given) if self.distilled else None,
            added_cond_kwargs=self.added(which),
            return_dict=False,
        )[0].float()
        if not guided:
            return said
        uncond, cond = said.chunk(2)
        mixed: Tensor = uncond + self.scale * (cond - uncond)
        if self.rescale > 0:
            mixed = rescale_noise_cfg(mixed, cond, self.rescale)
        return mixed

    def added(self, which: Tensor) -> dict[str, Tensor] | None:
        """What else the model reads, for candidates of these prompts, unconditional ones first."""
        return None

    def _scale_embedding(self, given: Tensor) -> Tensor:
        scales = torch.tensor(self.scale - 1).repeat(len(given))
        size = self.pipe.unet.config.time_cond_proj_dim
        embedding: Tensor = self.pipe.get_guidance_scale_embedding(scales, embedding_dim=size)
        return embedding.to(given)

    def decode(self, grid: Tensor) -> Tensor:
        pipe, vae = self.pipe, self.pipe.vae
        pixels: Tensor = vae.decode(grid.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        pixels, flagged = pipe.run_safety_checker(pixels, self.device, self.drawn)
        shown = [True] * len(pixels) if flagged is None else [not unsafe for unsafe in flagged]
        pixels = pipe.image_processor.postprocess(pixels, output_type="pt", do_denormalize=shown)
        return pixels.float()


@register_denoiser("StableDiffusionXLPipeline")
class StableDiffusionXLDenoiser(StableDiffusionDenoiser):
    """`StableDiffusionXLPipeline`; `settings.extra` also takes the sizes that it tells the model."""

    defaults = defaults_of(StableDiffusionXLPipeline)
    extras = (*StableDiffusionDenoiser.extras, "original_size", "crops_coords_top_left", "target_size")

    def encode(self, how: dict[str, Any]) -> None:
        pipe, extra = self.pipe, self.settings.extra
        found = pipe.encode_prompt(
            list(self.prompts), device=self.device, do_classifier_free_guidance=self.forwards == 2, **how
        )
        self.cond, self.uncond, self.pooled, self.uncond_pooled = found
        self.drawn = self.cond.dtype
        pairs = []
        whole = (self.height, self.width)
        for name, default in (("original_size", whole), ("crops_coords_top_left", (0, 0)), ("target_size", whole)):
            pair = extra.get(name) or default
            try:
                first, second = pair
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {pair!r} is not allowed, needs two numbers") from error
            pairs.append((check_number(name, first), check_number(name, second)))
        encoder = pipe.text_encoder_2
        width = self.pooled.shape[-1] if encoder is None else encoder.config.projection_dim
        ids = pipe._get_add_time_ids(*pairs, dtype=self.drawn, text_encoder_projection_dim=int(width))
        self.ids: Tensor = ids.to(self.device)

    def added(self, which: Tensor) -> dict[str, Tensor]:
        pooled = self.pooled[which]
        if self.forwards == 2:
            pooled = torch.cat([self.uncond_pooled[which], pooled])
        return {"text_embeds": pooled, "time_ids": self.ids.repeat(len(pooled), 1)}

    def decode(self, grid: Tensor) -> Tensor:
        pipe, vae = self.pipe, self.pipe.vae
        config = vae.config
        # In half precision this VAE overflows; like the pipeline, decode in single precision and put it back.
        upcast = vae.dtype == torch.float16 and config.force_upcast
        if upcast:
            vae.to(dtype=torch.float32)
        try:
            latents = grid.to(vae.dtype)
            mean, std = config.get("latents_mean"), config.get("latents_std")
            if mean is None or std is None:
                latents = latents / config.scaling_factor
            else:
                mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
                latents = latents * std / config.scaling_factor + mean
            pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        finally:
            if upcast:
                vae.to(dtype=torch.float16)
        if pipe.watermark is not None:
            pixels = pipe.watermark.apply_watermark(pixels)
        pixels = pipe.image_processor.postprocess(pixels, output_type="pt")
        return pixels.float()
