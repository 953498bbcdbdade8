"""The embedded tiny `ZImagePipeline`: real diffusers and transformers classes in a size a CPU can train."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastgen.models.tokenizers import build_text_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Model

TEXT_WIDTH = 160


def build_vae() -> AutoencoderKL:
    """An f=4 autoencoder with 16 latent channels: 64x64 pixels <-> 16x16 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_text_encoder(vocab_size: int) -> Qwen3Model:
    """A small causal Qwen3; the pipeline reads the hidden state before its last layer."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=0,
    )
    return Qwen3Model(config)


def build_transformer() -> ZImageTransformer2DModel:
    """A `ZImageTransformer2DModel` with the blocks of Z-Image at width 192 (patch 2: 64 tokens an image)."""
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=192,
        n_layers=5,
        n_refiner_layers=1,
        n_heads=6,
        n_kv_heads=6,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[160, 64, 64],
        rope_theta=256.0,
        t_scale=1000.0,
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The stock flow-matching Euler scheduler with a fixed shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=2.0)


def build_pipeline(seed: int = 0) -> ZImagePipeline:
    """The whole pipeline with random weights drawn from `seed`."""
    from diffusers import ZImagePipeline

    tokenizer = build_text_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ZImagePipeline(
            scheduler=build_scheduler(),
            vae=build_vae(),
            text_encoder=build_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=build_transformer(),
        )
