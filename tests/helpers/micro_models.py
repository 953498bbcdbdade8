"""Random-weight models of the very classes of the embedded ones, small enough that a picture takes milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

JANUS_TOKENS, JANUS_CODES = 16, 48

# Of unequal length, so that a batch of them is padded.
PROMPTS = [
    "a red circle",
    "two blue squares and one green star",
    "a ring",
    "a yellow heart left of a black triangle",
    "one cross above a white diamond",
    "red",
    "four purple stars",
    "a circle",
]


def micro_z_transformer(**config: Any) -> Any:
    """A Z-Image transformer of 32 channels and 2 layers with random weights, and captions of 24."""
    from diffusers import ZImageTransformer2DModel

    sizes = {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    rotary = {"cap_feat_dim": 24, "axes_dims": [4, 6, 6], "axes_lens": [128, 32, 32]}
    return ZImageTransformer2DModel(**{**sizes, **rotary, **config})


def save_micro_z_image(folder: Path, seed: int = 0) -> Path:
    """A ZImagePipeline for 16x16 pictures; sizes must be multiples of 8."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline
    from transformers import Qwen3Config, Qwen3Model

    from fastgen.models.tokenizers import build_text_tokenizer

    tokenizer = build_text_tokenizer()
    torch.manual_seed(seed)
    transformer = micro_z_transformer(in_channels=16, axes_lens=[160, 16, 16], cap_feat_dim=32)
    for name in ("x_pad_token", "cap_pad_token"):
        torch.nn.init.normal_(getattr(transformer, name), std=0.02)
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=1.0,
            shift_factor=0.0,
        ),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                pad_token_id=0,
            )
        ),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipe.save_pretrained(folder)
    _write_defaults(folder, {"height": 16, "width": 16, "steps": 2, "guidance_scale": 2.0})
    return folder


def awake(model: Any, seed: int = 1) -> Any:
    """Random weights in a scaffold where training starts from zero, so that everything depends on everything."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.scaffold.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


def save_micro_dc(folder: Path, micro_z: Path) -> Path:
    """The pipeline of `save_micro_z_image` with its transformer upcycled, scaffold random."""
    from diffusers import ZImagePipeline

    from fastgen.models.upcycle import upcycle

    pipe = ZImagePipeline.from_pretrained(micro_z, torch_dtype=torch.float32)
    pipe.register_modules(transformer=awake(upcycle(pipe.transformer)))
    pipe.save_pretrained(folder)
    _write_defaults(folder, {"height": 16, "width": 16, "steps": 2, "guidance_scale": 2.0})
    return folder


def save_micro_janus(folder: Path, seed: int = 0) -> Path:
    """A Janus that draws 16x16 pictures of 16 tokens from 48 codes."""
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
    )

    from fastgen.models.tiny_janus import build_generation_config
    from fastgen.models.tokenizers import build_janus_tokenizer

    tokenizer = build_janus_tokenizer()
    torch.manual_seed(seed)
    model = JanusForConditionalGeneration(
        JanusConfig(
            text_config=LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
            vision_config=JanusVisionConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=1,
                image_size=16,
                patch_size=4,
                num_image_tokens=JANUS_TOKENS,
                mlp_ratio=1.0,
                projection_dim=32,
                depth=1,
            ),
            vq_config=JanusVQVAEConfig(
                embed_dim=8,
                num_embeddings=JANUS_CODES,
                latent_channels=32,
                base_channels=32,
                channel_multiplier=[1, 1, 1],
                num_res_blocks=0,
                num_patches=4,
                projection_dim=32,
                image_token_embed_dim=32,
                num_hidden_layers=2,
            ),
            image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        )
    )
    # With the library's small initial weights every token would be equally likely, and every prompt alike.
    with torch.no_grad():
        for parameter in (*model.model.generation_head.parameters(), *model.model.language_model.parameters()):
            if parameter.ndim == 2:
                parameter.mul_(6)
    model.generation_config = build_generation_config()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_defaults(folder, {"height": 16, "width": 16, "guidance_scale": 3.0})
    return folder


def with_eagle(plain: Any) -> Any:
    """Speculative decoding of a `JanusImagePipeline`'s model, with a random EAGLE drafter."""
    from fastgen.drafters.eagle import EagleDrafter
    from fastgen.drafters.targets import target_of
    from fastgen.pipelines.speculative import SpeculativeImagePipeline

    torch.manual_seed(0)
    drafter = EagleDrafter.for_target(target_of(plain.model, plain.tokenizer), heads=2)
    return SpeculativeImagePipeline(plain.model, plain.tokenizer, drafter)


def _write_defaults(folder: Path, defaults: dict[str, Any]) -> None:
    (folder / "fastgen.json").write_text(json.dumps(defaults))


def micro_dc_dit(layers: int = 1) -> Any:
    """A DCDiTPipeline for 8x8 pictures, on 4 x 4 latents by default."""
    from diffusers import AutoencoderKL, DDIMScheduler

    from fastgen.models.dc_dit import DCDiTTransformer2DModel
    from fastgen.pipelines.dc_dit import DCDiTPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    model = DCDiTTransformer2DModel(num_layers=layers, num_attention_heads=2, attention_head_dim=16, sample_size=4)
    pipe = DCDiTPipeline(awake(model), vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
