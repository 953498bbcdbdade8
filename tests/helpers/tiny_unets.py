"""Tiny random-weight pipelines of models that predict noise: Stable Diffusion, its XL, DiT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from search_paths import deterministic
from tiny_pipelines import clip, quiet, shaken, tokenizer, vae
from torch import Tensor

from fastgen.pipelines.search.denoisers.base import Denoiser, Settings, denoiser_of

# Of unequal length, so that a batch of them is padded.
PROMPTS = ["a red circle", "two blue squares and one green star"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 4

Maker = Callable[..., Any]


def _unet(seed: int, **config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return shaken(
        UNet2DConditionModel(
            **{
                "sample_size": 8,
                "block_out_channels": (8, 16),
                "layers_per_block": 1,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "norm_num_groups": 4,
                "attention_head_dim": 2,
                "cross_attention_dim": 16,
                **config,
            }
        ),
        seed,
    )


def tiny_sd(scheduler: Any, distilled: bool = False, reads: int = 4) -> Any:
    """Stable Diffusion for pictures of 32 x 32; `distilled` reads the guidance scale itself, as an LCM; `reads`: 8
    channels for InstructPix2Pix."""
    from diffusers import StableDiffusionPipeline

    words = tokenizer(24)
    pipe = StableDiffusionPipeline(
        vae(1),
        clip(words, 2),
        words,
        _unet(3, time_cond_proj_dim=8 if distilled else None, in_channels=reads),
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # The pipeline takes a small size for a mistake in an old configuration.
    pipe.unet.register_to_config(sample_size=8)
    return quiet(pipe)


def tiny_sdxl(scheduler: Any, reads: int = 4) -> Any:
    """Stable Diffusion XL for pictures of 32 x 32."""
    from diffusers import StableDiffusionXLPipeline

    words = tokenizer(24)
    unet = _unet(
        3,
        in_channels=reads,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    encoders = clip(words, 2), clip(words, 4, projected=True)
    return quiet(StableDiffusionXLPipeline(vae(1), *encoders, words, words, unet, scheduler, add_watermarker=False))


def tiny_dit(scheduler: Any, doubled: bool = True) -> Any:
    """DiT for pictures of 32 x 32, with names of two classes; `doubled` predicts a variance as well."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8 if doubled else 4,
        num_layers=2,
        norm_num_groups=4,
        sample_size=8,
    )
    return quiet(
        DiTPipeline(shaken(transformer, 3), vae(1), scheduler, {207: "golden retriever", 1: "fish, goldfish"})
    )


@cache
def made(make: Maker, **how: Any) -> Any:
    """A pipeline that several tests use."""
    return make(ddim(), **how)


def with_scheduler(make: Maker, scheduler: Any, **how: Any) -> Any:
    pipe = made(make, **how)
    pipe.scheduler = scheduler
    return pipe


def ddim(**config: Any) -> DDIMScheduler:
    """As Stable Diffusion 1.5 has it: it decodes at the first noise level, not at 0."""
    return DDIMScheduler(**{**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **config})


def euler(**config: Any) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**{**BETAS, "timestep_spacing": "leading", "steps_offset": 1, **config})


def stock(pipe: Any, prompt: Any, seed: int, **given: Any) -> Tensor:
    """The pipeline's own picture [3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    picture: Tensor = pipe(prompt, num_inference_steps=STEPS, generator=generator, output_type="pt", **given).images[0]
    return picture


def compare(pipe: Any, settings: Settings, prompts: list[Any] = PROMPTS, **given: Any) -> None:
    """The adapter's pictures of all prompts together are the pipeline's, one at a time."""
    before = copy.deepcopy(pipe.scheduler.__dict__)
    ours = deterministic(pipe, prompts, [3, 4], settings)
    assert str(pipe.scheduler.__dict__) == str(before)
    for row, prompt in enumerate(prompts):
        theirs = stock(pipe, [prompt] if isinstance(prompt, int) else prompt, 3 + row, **given)
        assert ours[row].shape == theirs.shape
        assert float((ours[row] - theirs).abs().max()) < 2e-4
        assert float(theirs.std()) > 0.1


def denoiser(pipe: Any, prompts: list[Any] = PROMPTS, settings: Settings | None = None) -> Denoiser:
    return denoiser_of(pipe)(pipe, prompts, settings or Settings(STEPS))
