"""Prompts of a Janus model (chat format, begin-of-image token, the row without a prompt), and its picture's size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["format_prompt", "image_size", "prompt_ids", "prompt_lengths", "unconditional_ids"]


def format_prompt(model: Any, tokenizer: Any, text: str) -> str:
    """Prompt in the model's chat format, if it has one, followed by the begin-of-image token.

    Raises:
        ValueError: the text contains a special token.
    """
    begin = _begin_of_image(model, tokenizer)
    special = [token for token in {begin, *tokenizer.all_special_tokens} if token in text]
    if special:
        # It would be read as the token itself: an early image start, or a blanked-out row that is not blank.
        raise ValueError(f"prompt: {text!r} contains the special token {sorted(special)[0]!r} of the model")
    if tokenizer.chat_template:
        parts: Any = [{"type": "text", "text": text}]
        formatted = _apply_template(tokenizer, parts)
        # A template for plain strings prints the list of parts as Python would.
        text = formatted if "{'type'" not in formatted else _apply_template(tokenizer, text)
    return text + begin


def image_size(model: Any) -> int:
    """Height and width in pixels; a Janus model draws one size only."""
    vq = model.config.vq_config
    return int(vq.num_patches * 2 ** (len(vq.channel_multiplier) - 1))


def prompt_ids(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, P] of formatted prompts, left-padded: the token that is drawn next follows the prompt."""
    inputs = tokenizer(list(texts), padding=True, padding_side="left", return_tensors="pt")
    return inputs["input_ids"], inputs["attention_mask"]


def prompt_lengths(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt with its frame."""
    texts = [format_prompt(model, tokenizer, prompt) for prompt in prompts]
    return [len(ids) for ids in tokenizer(texts)["input_ids"]]


def unconditional_ids(model: Any, ids: Tensor) -> Tensor:
    """The ids with everything but begin marks replaced by padding, as stock `generate` does; the mask stays."""
    config = model.generation_config
    marks = (ids == config.bos_token_id) | (ids == config.generation_kwargs["boi_token_id"])
    return torch.where(marks, ids, config.pad_token_id)


def _begin_of_image(model: Any, tokenizer: Any) -> str:
    token = getattr(tokenizer, "boi_token", None)
    if token is None:
        generation = getattr(model.generation_config, "generation_kwargs", None) or {}
        token = tokenizer.convert_ids_to_tokens(generation["boi_token_id"])
    return str(token)


def _apply_template(tokenizer: Any, content: Any) -> str:
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
