"""Tiny random-weight pipelines of the newer families of text-to-image models, for pictures of 32 x 32 or 64 x 64."""

from __future__ import annotations

from typing import Any

from tiny_families import flow
from tiny_pipelines import begin_template, clip, joint, quiet, qwen_vae, qwen_vl, shaken, t5, text, tokenizer, vae
from tiny_variants import Texts

_HEADS = {"num_key_value_heads": 1, "head_dim": 8}
_CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def _flux2_vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    return shaken(
        AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8,) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        ),
        1,
    )


def _flux2_transformer(guidance_embeds: bool) -> Any:
    from diffusers import Flux2Transformer2DModel

    config = joint(joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance_embeds)
    return Flux2Transformer2DModel(in_channels=16, timestep_guidance_channels=16, **config)


def tiny_flux2_klein(layers: int = 3) -> Any:
    """With `layers` of the text encoder; a call without further arguments reads the 27th."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    words = tokenizer(512)
    words.chat_template = _CHAT
    encoder = Qwen3ForCausalLM(Qwen3Config(**text(words, layers), **_HEADS))
    transformer = _flux2_transformer(guidance_embeds=False)
    scheduler = flow(use_dynamic_shifting=True)
    return quiet(Flux2KleinPipeline(scheduler, _flux2_vae(), shaken(encoder, 3), words, shaken(transformer, 4)))


def tiny_flux2(layers: int = 3) -> Any:
    """FLUX.2-dev: with guidance distilled, and Mistral in place of Qwen; a call reads its 30th layer by default."""
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    words = tokenizer(512)
    words.chat_template = "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"
    language = {"model_type": "mistral", **text(words, layers), **_HEADS}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=language, vision_config=vision, image_token_index=len(words) - 1)
    )
    transformer = _flux2_transformer(guidance_embeds=True)
    scheduler = flow(use_dynamic_shifting=True)
    return quiet(Flux2Pipeline(scheduler, _flux2_vae(), shaken(encoder, 3), words, shaken(transformer, 4)))


def tiny_hidream() -> Any:
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer(128)
    llama = LlamaForCausalLM(LlamaConfig(**text(words), **_HEADS))
    llama.config._attn_implementation = "eager"  # its attention maps are asked for
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[16, 16],
        text_emb_dim=32,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    pipe = HiDreamImagePipeline(
        flow(shift=3.0),
        vae(1),
        clip(words, 2, projected=True),
        words,
        clip(words, 3, projected=True),
        words,
        t5(words, 5),
        words,
        shaken(llama, 6),
        tokenizer(128),
        shaken(transformer, 4),
    )
    pipe.default_sample_size = 8  # every size is scaled to this area
    return quiet(pipe)


def tiny_kandinsky5() -> Any:
    from diffusers import Kandinsky5T2IPipeline, Kandinsky5Transformer3DModel

    words = tokenizer(512)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=32,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(2, 2, 4),
    )
    parts = (shaken(transformer, 4), vae(1, blocks=4), qwen_vl(words), Texts(words), clip(tokenizer(77), 3))
    pipe = Kandinsky5T2IPipeline(*parts, tokenizer(77), flow(shift=3.0))
    begin_template(pipe, pipe.prompt_template)
    pipe.resolutions = [(64, 64), (64, 96)]
    return quiet(pipe)


def tiny_hunyuan_image(meanflow: bool = False, momentum: float | None = None) -> Any:
    from diffusers import (
        AdaptiveProjectedMixGuidance,
        AutoencoderKLHunyuanImage,
        HunyuanImagePipeline,
        HunyuanImageTransformer2DModel,
    )

    words, glyphs = tokenizer(1000), tokenizer(128)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=32,
        text_embed_2_dim=16,
        rope_axes_dim=(8, 8),
        use_meanflow=meanflow,
    )
    decoder = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=32,
        scaling_factor=0.7,
    )
    guider = AdaptiveProjectedMixGuidance(
        guidance_scale=2.0,
        adaptive_projected_guidance_scale=3.0,
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_start_step=2,
    )
    parts = (
        flow(shift=3.0),
        shaken(decoder, 1),
        qwen_vl(words),
        words,
        t5(glyphs, 3),
        glyphs,
        shaken(transformer, 4),
    )
    pipe = HunyuanImagePipeline(*parts, guider=guider, ocr_guider=guider)
    begin_template(pipe, pipe.prompt_template_encode)
    pipe.tokenizer_max_length = 64
    return quiet(pipe)


def tiny_bria_fibo() -> Any:
    from diffusers import AutoencoderKLWan, BriaFiboPipeline, BriaFiboTransformer2DModel
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    words = tokenizer(256)
    config = text(words, vocab_size=128256, num_key_value_heads=1)
    encoder = SmolLM3ForCausalLM(SmolLM3Config(**config, pad_token_id=0, bos_token_id=0, eos_token_id=0))
    transformer = BriaFiboTransformer2DModel(in_channels=4, **joint(joint_attention_dim=32), text_encoder_dim=16)
    decoder = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, -0.1],
        latents_std=[0.8, 1.2, 1.0, 1.5],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
    )
    parts = (shaken(transformer, 4), flow(use_dynamic_shifting=True), shaken(decoder, 1), shaken(encoder, 3), words)
    return quiet(BriaFiboPipeline(*parts))


def tiny_prx() -> Any:
    from diffusers import PRXPipeline, PRXTransformer2DModel
    from transformers import T5GemmaEncoder, T5GemmaModuleConfig

    words = tokenizer(64)
    module = T5GemmaModuleConfig(**text(words), **_HEADS, pad_token_id=0, dropout_rate=0.0)
    transformer = PRXTransformer2DModel(
        in_channels=4, context_in_dim=16, hidden_size=16, num_heads=2, depth=2, axes_dim=[4, 4]
    )
    encoder = shaken(T5GemmaEncoder(module), 3)
    pipe = PRXPipeline(shaken(transformer, 4), flow(shift=3.0), encoder, words, vae(1))
    return quiet(pipe)


def tiny_krea2() -> Any:
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel
    from transformers import Qwen3VLConfig, Qwen3VLModel

    words = tokenizer(512)
    rope = {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
    language = text(words, rope_scaling=rope, **_HEADS)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen3VLModel(Qwen3VLConfig(text_config=language, vision_config=vision))
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    parts = (flow(use_dynamic_shifting=True), qwen_vae(), shaken(encoder, 3), words, shaken(transformer, 4))
    return quiet(Krea2Pipeline(*parts, text_encoder_select_layers=(1, 2)))


def tiny_glm_image() -> Any:
    """Its language model draws tokens first; here they are given, as `prior_token_ids`."""
    from diffusers import GlmImagePipeline, GlmImageTransformer2DModel

    words = tokenizer(64)
    transformer = GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=32,
    )
    scheduler = flow(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True)
    decoder = vae(1)
    decoder.register_to_config(latents_mean=[0.1, -0.2, 0.3, -0.1], latents_std=[0.8, 1.2, 1.0, 1.5])
    return quiet(GlmImagePipeline(words, None, t5(words, 3), None, decoder, shaken(transformer, 4), scheduler))


def tiny_ernie_image() -> Any:
    from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel
    from transformers import MistralConfig, MistralModel

    words = tokenizer(64)
    encoder = MistralModel(MistralConfig(**text(words), **_HEADS))
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    parts = (shaken(transformer, 4), _flux2_vae(), shaken(encoder, 3), words, flow(shift=3.0))
    return quiet(ErnieImagePipeline(*parts))


def tiny_omnigen() -> Any:
    from diffusers import OmniGenPipeline, OmniGenTransformer2DModel

    words = tokenizer(512)
    rope = {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4, "type": "su"}
    transformer = OmniGenTransformer2DModel(
        in_channels=4,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=2,
        pad_token_id=0,
        vocab_size=len(words),
        max_position_embeddings=1024,
        rope_scaling=rope,
        pos_embed_max_size=32,
        time_step_dim=16,
    )
    return quiet(
        OmniGenPipeline(shaken(transformer, 4), flow(invert_sigmas=True, num_train_timesteps=1), vae(1), words)
    )
