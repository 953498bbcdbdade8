"""The embedded tiny `JanusForConditionalGeneration`: real transformers classes in a size a CPU can train."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastgen.models.tokenizers import build_janus_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, JanusForConditionalGeneration, JanusProcessor

CODEBOOK_SIZE = 512
GRID = 16
WIDTH = 256


def build_janus(seed: int = 0) -> JanusForConditionalGeneration:
    """A Janus with a 16x16-token VQ tokenizer of 512 codes and a 4-layer Llama, with random weights.

    The vision tower (image understanding) is the smallest the class allows: image generation never runs it.
    """
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
    )

    tokenizer = build_janus_tokenizer()
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=4 * GRID,
            patch_size=4,
            num_image_tokens=GRID * GRID,
            mlp_ratio=1.0,
            projection_dim=WIDTH,
            depth=1,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=CODEBOOK_SIZE,
            latent_channels=64,
            base_channels=32,
            channel_multiplier=[1, 1, 2],
            num_res_blocks=0,
            num_patches=GRID,
            projection_dim=WIDTH,
            image_token_embed_dim=WIDTH,
            num_hidden_layers=2,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration(config)
    model.generation_config = build_generation_config()
    return model


def build_generation_config() -> GenerationConfig:
    """The generation settings that `generate(generation_mode="image")` reads."""
    from transformers import GenerationConfig

    tokenizer = build_janus_tokenizer()
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        guidance_scale=4.0,
        max_length=512,
        generation_kwargs={"boi_token_id": tokenizer.convert_tokens_to_ids("<begin_of_image>")},
    )


def build_processor() -> JanusProcessor:
    """The stock Janus processor: tokenizer, image processor for 64x64 pictures, 256 image tokens."""
    from transformers import JanusProcessor
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    image_processor = JanusImageProcessorPil(
        size={"height": 4 * GRID, "width": 4 * GRID}, min_size=4 * GRID, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return JanusProcessor(image_processor, build_janus_tokenizer(), num_image_tokens=GRID * GRID)
