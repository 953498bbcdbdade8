"""Tiny Emu3, Chameleon and LlamaGen models with random weights. In the first two, text and picture tokens share a
vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.emu3.configuration_emu3 import Emu3TextConfig, Emu3VQVAEConfig

from fastgen.drafters.targets import Target, target_of
from fastgen.pipelines.speculative import SpeculativeImagePipeline

CODES, SIZE = 24, (3, 4)
WORDS = ["<pad>", "<unk>", "<s>", "</s>", "<boi>", "<wrapper>", "<eol>", "<image>", "3", "4", "*", "red", "ring", "a"]
LANGUAGE = {
    "vocab_size": len(WORDS) + CODES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"boi_token": "<boi>", "image_wrapper_token": "<wrapper>", "image_token": "<image>"},
    )


def louder(model: Any) -> Any:
    """So that tokens differ in probability."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "vqmodel" not in name:
                parameter.mul_(5)
    return model.eval().requires_grad_(False)


def emu3() -> Target:
    # Codes in the vocabulary in another order than in the codebook.
    places = {f"<|visual token {code:06d}|>": len(WORDS) + (7 * code) % CODES for code in range(CODES)}
    torch.manual_seed(0)
    model = Emu3ForConditionalGeneration(
        Emu3Config(
            text_config=Emu3TextConfig(
                **LANGUAGE,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=3,
            ),
            vq_config=Emu3VQVAEConfig(
                codebook_size=CODES,
                embed_dim=4,
                latent_channels=4,
                base_channels=32,
                channel_multiplier=[1, 1],
                num_res_blocks=1,
                attn_resolutions=[],
                hidden_size=32,
                temporal_downsample_factor=1,
            ),
            vocabulary_map={"<|extra_200|>": WORDS.index("<eol>"), "<image>": WORDS.index("<image>"), **places},
        )
    )
    return target_of(louder(model), tokenizer(), size=SIZE)


def chameleon(swin: bool = False, line_end: int | None = None) -> Target:
    names = {
        f"IMGIMG{''.join(chr(ord('A') + int(d)) for d in str(code))}Z": len(WORDS) + code for code in range(CODES)
    }
    torch.manual_seed(0)
    model = ChameleonForConditionalGeneration(
        ChameleonConfig(
            **LANGUAGE,
            swin_norm=swin,
            vq_config=ChameleonVQVAEConfig(
                embed_dim=4,
                num_embeddings=CODES,
                latent_channels=4,
                base_channels=32,
                channel_multiplier=[1],
                num_res_blocks=1,
                resolution=16,
            ),
            vocabulary_map={"<image>": WORDS.index("<image>"), **names},
            pad_token_id=0,
        )
    )
    return target_of(louder(model), tokenizer(), size=SIZE, line_end=line_end)


def emu3_pipeline() -> SpeculativeImagePipeline:
    return SpeculativeImagePipeline(emu3().model, tokenizer(), options={"size": SIZE})


def chameleon_pipeline() -> SpeculativeImagePipeline:
    """Chameleon's own decoder is not in transformers: codes become grey values."""

    def decode(codes: Any) -> Any:
        return (codes / CODES).float()[:, None].expand(-1, 3, -1, -1)

    return SpeculativeImagePipeline(chameleon().model, tokenizer(), options={"size": SIZE, "decode": decode})


def llamagen() -> Target:
    """It draws 4 x 4 tokens; Janus has the same decoder."""
    from transformers import JanusVQVAEConfig, T5Config, T5EncoderModel
    from transformers.models.janus.modeling_janus import JanusVQVAE

    from fastgen.models.llamagen import LlamaGen, LlamaGenTransformer
    from fastgen.models.tokenizers import build_text_tokenizer

    words = build_text_tokenizer()
    torch.manual_seed(1)
    text = T5EncoderModel(T5Config(vocab_size=len(words), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3))
    vq = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=40,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=0,
        num_patches=4,
    )
    decoder = JanusVQVAE(vq)
    torch.manual_seed(0)
    transformer = LlamaGenTransformer(
        vocab_size=40,
        dim=32,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        grid=4,
        caption_dim=24,
        caption_tokens=12,
        multiple_of=16,
    )
    with torch.no_grad():  # so that tokens differ in probability
        for parameter in transformer.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return target_of(LlamaGen(transformer, decoder, text).eval().requires_grad_(False), words)


def llamagen_pipeline() -> SpeculativeImagePipeline:
    target = llamagen()
    return SpeculativeImagePipeline(target.model, target.tokenizer)
