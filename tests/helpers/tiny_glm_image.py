"""GLM-Image with random weights, its language model, processor and chat template included."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tiny_newer import tiny_glm_image
from tiny_pipelines import shaken, vae

CODES = 32
_SPECIAL = ("<pad>", "<unk>", "<img>", "<|image|>", "<sop>", "<eop>", "<start>", "<end>")
_TEXT = ("a", "red", "blue", "ring", *map(str, range(10)))
#: The first ids are picture tokens.
WORDS = [*(f"<code{code}>" for code in range(CODES)), *_SPECIAL, *_TEXT]
_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<start><|image|><end>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def _processor() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GlmImageImageProcessor, GlmImageProcessor, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    names = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
    words = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        extra_special_tokens=names,
        padding_side="left",
    )
    pictures = GlmImageImageProcessor(
        patch_size=16, merge_size=1, temporal_patch_size=1, min_pixels=32 * 32, max_pixels=64 * 64
    )
    return GlmImageProcessor(pictures, words, chat_template=_TEMPLATE)


@cache
def language_model() -> Any:
    from transformers import GlmImageConfig, GlmImageForConditionalGeneration

    place = WORDS.index
    config = GlmImageConfig(
        text_config={
            "vocab_size": len(WORDS),
            "vision_vocab_size": CODES,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 1024,
            "pad_token_id": place("<pad>"),
            "eos_token_id": place("<end>"),
            # Half of a head is rotated, as in the published model.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 2],
            },
        },
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "image_size": 64},
        vq_config={"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 16},
        image_token_id=place("<|image|>"),
        image_start_token_id=place("<start>"),
        image_end_token_id=place("<end>"),
    )
    torch.manual_seed(0)
    model = shaken(GlmImageForConditionalGeneration(config), 3)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)  # so that tokens differ in probability
    return model.requires_grad_(False)


def tiny_whole_glm_image() -> Any:
    pipe = tiny_glm_image()
    decoder = vae(4, blocks=4)
    decoder.register_to_config(latents_mean=[0.1] * 4, latents_std=[1.0] * 4)
    parts = {**pipe.components, "vision_language_encoder": language_model(), "processor": _processor(), "vae": decoder}
    made = type(pipe)(**parts)
    made.set_progress_bar_config(disable=True)
    return made
