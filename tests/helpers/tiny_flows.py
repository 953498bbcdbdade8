"""Tiny random-weight pipelines of flow-matching models: FLUX.1, Stable Diffusion 3, Qwen-Image, Sana."""

from __future__ import annotations

from typing import Any

from tiny_pipelines import begin_template, clip, joint, quiet, qwen_vae, qwen_vl, shaken, t5, text, tokenizer, vae

#: Of the transformer of Stable Diffusion 3 and of its ControlNets.
SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 16,
}
#: Of the transformer of Qwen-Image and of its ControlNets.
QWEN = {
    "in_channels": 16,
    "out_channels": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}


def tiny_flux(distilled: bool, reads: int = 16) -> Any:
    """FLUX.1 of sizes that are multiples of 8: with guidance distilled and a dynamic shift as dev, else as schnell;
    `reads` channels of latents and conditions."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    words = tokenizer(24)
    transformer = FluxTransformer2DModel(
        in_channels=reads, out_channels=16, **joint(), pooled_projection_dim=16, guidance_embeds=distilled
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if distilled else 1.0, use_dynamic_shifting=distilled, base_image_seq_len=4, max_image_seq_len=1024
    )
    return quiet(
        FluxPipeline(scheduler, vae(1), clip(words, 2), words, t5(words, 3), tokenizer(24), shaken(transformer, 4))
    )


def tiny_sd3(dynamic: bool = False, channels: int = 4) -> Any:
    """Stable Diffusion 3 of sizes that are multiples of 8, its latents of 4 channels or of 16."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    words = tokenizer(24)
    config = {**SD3, "in_channels": channels, "out_channels": channels, "num_layers": 2}
    transformer = SD3Transformer2DModel(**config, dual_attention_layers=(0,), qk_norm="rms_norm")
    return quiet(
        StableDiffusion3Pipeline(
            transformer=shaken(transformer, 4),
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=dynamic, base_image_seq_len=4, max_image_seq_len=1024
            ),
            vae=vae(1, channels),
            text_encoder=clip(words, 2, projected=True),
            tokenizer=words,
            text_encoder_2=clip(words, 3, projected=True),
            tokenizer_2=words,
            text_encoder_3=t5(words, 5, channels=32),
            tokenizer_3=words,
        )
    )


def tiny_qwen_image() -> Any:
    """Qwen-Image of sizes that are multiples of 8."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    words = tokenizer(512)
    encoder = qwen_vl(words)
    transformer = QwenImageTransformer2DModel(**QWEN, num_layers=2)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=1024, shift_terminal=0.02
    )
    pipe = QwenImagePipeline(scheduler, qwen_vae(), encoder, words, shaken(transformer, 3))
    begin_template(pipe, pipe.prompt_template_encode)
    return quiet(pipe)


def tiny_sana(scheduler: Any = None, sample_size: int = 8, blocks: int = 3, doubled: bool = False) -> Any:
    """Sana of sizes that are multiples of 32, its tokenizer left-padded; `doubled` predicts a variance as well."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    words = tokenizer(2048, side="left")
    encoder = Gemma2Model(Gemma2Config(**text(words), num_key_value_heads=2, head_dim=8, pad_token_id=0))
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=8 if doubled else 4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=sample_size,
        timestep_scale=0.5,
    )
    decoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8,) * blocks,
        decoder_block_out_channels=(8,) * blocks,
        encoder_layers_per_block=(1,) * blocks,
        decoder_layers_per_block=(1,) * blocks,
        encoder_qkv_multiscales=((),) * blocks,
        decoder_qkv_multiscales=((),) * blocks,
        scaling_factor=0.6,
    )
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(SanaPipeline(words, shaken(encoder, 2), shaken(decoder, 1), shaken(transformer, 3), scheduler))
