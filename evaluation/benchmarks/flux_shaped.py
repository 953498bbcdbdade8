"""A FLUX pipeline of one block of each kind with random weights, to measure what surrounds its model."""

from __future__ import annotations

from typing import Any

import torch

from fastgen.models.tokenizers import build_text_tokenizer

__all__ = ["flux_shaped"]


def flux_shaped(heads: int = 6) -> Any:
    """A `FluxPipeline` as FLUX.1-dev in all but the number of its blocks and of its heads (24 there).

    Its text encoders are tiny, because a search runs them once.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_words, t5_words = build_text_tokenizer(), build_text_tokenizer()
    clip_words.model_max_length, t5_words.model_max_length = 77, 512
    small = {"vocab_size": len(clip_words), "num_attention_heads": 2, "num_hidden_layers": 1}
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": clip_words.eos_token_id}
    clip = CLIPTextModel(CLIPTextConfig(hidden_size=64, intermediate_size=64, **small, **ends))
    t5 = T5EncoderModel(T5Config(vocab_size=len(t5_words), d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=heads,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=True,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32,) * 4,
            latent_channels=16,
            shift_factor=0.1,
        )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return FluxPipeline(scheduler, vae.eval(), clip.eval(), clip_words, t5.eval(), t5_words, transformer.eval())
