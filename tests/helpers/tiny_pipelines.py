"""Parts of diffusers pipelines: the real classes with random weights, so small that a picture takes milliseconds."""

from __future__ import annotations

from typing import Any

import torch


def tokenizer(length: int, side: str = "right") -> Any:
    """Lower-cased words of the embedded models, and an end mark, on which CLIP pools; `length` tokens at most."""
    from tokenizers import processors

    from fastgen.models.tokenizers import build_text_tokenizer

    words = build_text_tokenizer()
    end = words.eos_token
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, words.eos_token_id)]
    )
    words.model_max_length, words.padding_side = length, side
    return words


def shaken(model: Any, seed: int) -> Any:
    """Random weights in place of the library's, of which many are zero, so that everything depends on everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    return model.eval()


def quiet(pipe: Any) -> Any:
    """The pipeline without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loaded(kind: Any, folder: Any) -> Any:
    """A saved pipeline in float32, without a progress bar."""
    return quiet(kind.from_pretrained(folder, torch_dtype=torch.float32))


def text(words: Any, layers: int = 2, **more: Any) -> dict[str, Any]:
    """Arguments of a small text model's configuration."""
    return {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        **more,
    }


def joint(**more: Any) -> dict[str, Any]:
    """Arguments of a small transformer that reads tokens of text and of a picture together."""
    return {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        **more,
    }


def clip(words: Any, seed: int, projected: bool = False) -> Any:
    """A CLIP text model, 16 channels."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        **text(words, layers=3),
        projection_dim=16,
        max_position_embeddings=words.model_max_length,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
    )
    return shaken((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), seed)


def t5(words: Any, seed: int, channels: int = 16) -> Any:
    """A T5 encoder."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(words), d_model=channels, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return shaken(T5EncoderModel(config), seed)


def vae(seed: int, channels: int = 4, blocks: int = 3) -> Any:
    """A VAE that makes pictures four times as large as latents; each further block doubles that."""
    from diffusers import AutoencoderKL

    return shaken(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=(8,) * blocks,
            layers_per_block=1,
            latent_channels=channels,
            norm_num_groups=4,
            sample_size=32,
            scaling_factor=0.7,
            shift_factor=0.1,
        ),
        seed,
    )


def qwen_vae() -> Any:
    """The decoder of Qwen-Image, that Krea 2 has too."""
    from diffusers import AutoencoderKLQwenImage

    decoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, -0.1],
        latents_std=[0.8, 1.2, 1.0, 1.5],
    )
    return shaken(decoder, 1)


def qwen_vl(words: Any) -> Any:
    """Qwen2.5-VL, the text encoder of Qwen-Image and of Kandinsky 5."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"type": "mrope", "mrope_section": [2, 2, 4], "rope_type": "default"}
    language = text(words, hidden_size=32, intermediate_size=64, num_key_value_heads=2, rope_scaling=rope)
    language |= {"bos_token_id": 0, "eos_token_id": 0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    return shaken(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=language, vision_config=vision)), 2)


def begin_template(pipe: Any, template: str) -> None:
    """Where the prompt begins in the pipeline's template is counted in tokens of the real tokenizer."""
    before = pipe.tokenizer(template.split("{}")[0], add_special_tokens=False)
    pipe.prompt_template_encode_start_idx = len(before.input_ids)
