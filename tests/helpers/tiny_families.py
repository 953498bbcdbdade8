"""Tiny random-weight pipelines of more families of text-to-image models, for pictures of 32 x 32."""

from __future__ import annotations

from typing import Any

from tiny_pipelines import joint, quiet, shaken, t5, text, tokenizer, vae


def flow(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def _pixart_transformer(doubled: bool = True, sample_size: int = 8) -> Any:
    from diffusers import PixArtTransformer2DModel

    return shaken(
        PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            out_channels=8 if doubled else 4,
            num_layers=2,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=sample_size,
            norm_num_groups=4,
            use_additional_conditions=False,
        ),
        4,
    )


def tiny_pixart_alpha() -> Any:
    from diffusers import DDIMScheduler, PixArtAlphaPipeline

    return quiet(
        PixArtAlphaPipeline(tokenizer(120), t5(tokenizer(120), 3), vae(1), _pixart_transformer(), DDIMScheduler())
    )


def tiny_pixart_sigma(sample_size: int = 8) -> Any:
    """Sizes are binned by default, which needs a sample size of 32 or more."""
    from diffusers import DDIMScheduler, PixArtSigmaPipeline

    transformer = _pixart_transformer(sample_size=sample_size)
    return quiet(PixArtSigmaPipeline(tokenizer(300), t5(tokenizer(300), 3), vae(1), transformer, DDIMScheduler()))


def tiny_aura_flow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
    from transformers import UMT5Config, UMT5EncoderModel

    words = tokenizer(256)
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return quiet(AuraFlowPipeline(words, shaken(encoder, 3), vae(1), shaken(transformer, 4), flow(shift=1.73)))


def tiny_chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    words = tokenizer(64)
    approximator = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    transformer = ChromaTransformer2DModel(in_channels=16, **joint(), **approximator)
    return quiet(ChromaPipeline(flow(), vae(1), t5(words, 3), words, shaken(transformer, 4)))


def tiny_lumina2() -> Any:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    words = tokenizer(256)
    encoder = Gemma2Model(Gemma2Config(**text(words), num_key_value_heads=2, head_dim=8, pad_token_id=0))
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 32, 32),
        cap_feat_dim=16,
    )
    return quiet(Lumina2Pipeline(shaken(transformer, 4), flow(shift=6.0), vae(1), shaken(encoder, 3), words))


def tiny_cogview4() -> Any:
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel
    from transformers import GlmConfig, GlmModel

    words = tokenizer(1024)
    encoder = GlmModel(GlmConfig(**text(words), num_key_value_heads=1, head_dim=8, pad_token_id=0))
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    scheduler = flow(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True)
    return quiet(CogView4Pipeline(words, shaken(encoder, 3), vae(1), shaken(transformer, 4), scheduler))


def tiny_cogview3() -> Any:
    from diffusers import CogVideoXDDIMScheduler, CogView3PlusPipeline, CogView3PlusTransformer2DModel

    words = tokenizer(224)
    transformer = CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    return quiet(CogView3PlusPipeline(words, t5(words, 3), vae(1), shaken(transformer, 4), CogVideoXDDIMScheduler()))


def tiny_hunyuan_dit() -> Any:
    from diffusers import DDIMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel

    words, longer = tokenizer(77), tokenizer(256)
    encoder = BertModel(BertConfig(**text(words), max_position_embeddings=77))
    transformer = HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        mlp_ratio=2.0,
        in_channels=4,
        hidden_size=16,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=77,
        text_len_t5=256,
    )
    return quiet(
        HunyuanDiTPipeline(
            vae(1, blocks=4),  # the pipeline's rotary grid is counted in eighths of the size
            shaken(encoder, 2),
            words,
            shaken(transformer, 4),
            DDIMScheduler(clip_sample=False),
            None,
            None,
            False,
            t5(longer, 3),
            longer,
        )
    )


def tiny_ovis_image() -> Any:
    from diffusers import OvisImagePipeline, OvisImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    words = tokenizer(512)
    encoder = Qwen3Model(Qwen3Config(**text(words), num_key_value_heads=1, head_dim=8))
    transformer = OvisImageTransformer2DModel(in_channels=16, out_channels=16, **joint())
    pipe = OvisImagePipeline(flow(), vae(1), shaken(encoder, 3), words, shaken(transformer, 4))
    return quiet(pipe)


def tiny_kandinsky3() -> Any:
    from diffusers import DDIMScheduler, Kandinsky3Pipeline, Kandinsky3UNet, VQModel

    words = tokenizer(128)
    unet = Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(16, 32),
        cross_attention_dim=4,
        encoder_hid_dim=16,
    )
    movq = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=12,
        norm_num_groups=32,
        norm_type="spatial",
        vq_embed_dim=4,
    )
    # Not the squared cosine of the published one: its first step divides by 1e-4 and the rounding shows.
    scheduler = DDIMScheduler(clip_sample=False, beta_schedule="linear")
    return quiet(Kandinsky3Pipeline(words, t5(words, 3), shaken(unet, 4), scheduler, shaken(movq, 1)))
