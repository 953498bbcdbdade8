"""How much of a prompt a model reads: what it would cut off without a word is refused or logged."""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from fastgen.accounting import add_note
from fastgen.errors import FastgenError
from fastgen.pipelines.settings import draws_tokens

__all__ = ["check_prompt_lengths"]

logger = logging.getLogger(__name__)

# Tokenizers that know no limit say a number of this size.
_NO_LIMIT = 10**6


def check_prompt_lengths(
    pipe: DiffusionPipeline, prompts: Sequence[str], max_sequence_length: int | None = None
) -> dict[str, list[str]]:
    """Refuse prompts that a Z-Image model or a model of tokens has no room for; log what other text encoders cut off.

    Stable Diffusion and its relatives draw from the beginning of a long prompt: one log line per prompt and encoder
    quotes the rest. It is also among the notes of open accounts (`fastgen.accounting`).

    Args:
        pipe: the pipeline that will be called.
        prompts: all that it will be given, negative ones too.
        max_sequence_length: as it will be passed to the call; None for the pipeline's default.

    Returns:
        the lines of each prompt that is cut off.

    Raises:
        FastgenError: names the prompt and the limit.
    """
    notes: dict[str, list[str]] = defaultdict(list)
    prompts = list(dict.fromkeys(prompts))
    if draws_tokens(type(pipe)):
        tokens: Any = pipe
        tokens.check_prompts(prompts)
        return notes
    if any(base.__name__ == "ZImagePipeline" for base in type(pipe).__mro__):
        _check_z_image(pipe, prompts, max_sequence_length or 512)
        return notes
    for name, tokenizer, limit in _readers(pipe, max_sequence_length):
        for prompt in prompts:
            if rest := _beyond(tokenizer, prompt, limit):
                note = f"{name} reads {limit} tokens; this end of a prompt is cut off: {rest!r}"
                logger.warning("%s", note)
                add_note(note)
                notes[prompt].append(note)
    return notes


def _check_z_image(pipe: Any, prompts: Sequence[str], limit: int) -> None:
    if getattr(pipe, "tokenizer", None) is None:
        return
    if lengths := getattr(getattr(getattr(pipe, "transformer", None), "config", None), "axes_lens", None):
        # The text is padded to a multiple of 32; positions start at 1 and the picture has the one after the text.
        limit = min(limit, (int(lengths[0]) - 2) // 32 * 32)
    for prompt in prompts:
        text = pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        if (length := len(pipe.tokenizer(text, verbose=False)["input_ids"])) > limit:
            raise FastgenError(
                f"prompt: {_short(prompt)!r} has {length} tokens with its frame, the model takes {limit}"
            )


def _readers(pipe: Any, max_sequence_length: int | None) -> Iterator[tuple[str, Any, int]]:
    """Name, tokenizer and number of tokens of every text encoder with a limit."""
    call = inspect.signature(type(pipe).__call__).parameters
    argument = call["max_sequence_length"].default if "max_sequence_length" in call else None
    for suffix in ("", "_2", "_3", "_4"):
        tokenizer, encoder = getattr(pipe, f"tokenizer{suffix}", None), getattr(pipe, f"text_encoder{suffix}", None)
        if tokenizer is None or encoder is None:
            continue
        limit = getattr(tokenizer, "model_max_length", _NO_LIMIT)
        config = getattr(encoder, "config", None)
        if str(getattr(config, "model_type", "")).startswith("clip"):
            limit = min(limit, getattr(config, "max_position_embeddings", limit))
        elif isinstance(argument, int):
            limit = max_sequence_length or argument
        if limit < _NO_LIMIT:
            yield f"text_encoder{suffix}", tokenizer, int(limit)


def _beyond(tokenizer: Any, prompt: str, limit: int) -> str:
    """The end of the prompt that does not fit into `limit` tokens; "" when all does."""
    room = max(0, limit - tokenizer.num_special_tokens_to_add())
    fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(prompt, add_special_tokens=False, verbose=False, return_offsets_mapping=fast)
    ids = encoded["input_ids"]
    if len(ids) <= room:
        return ""
    return prompt[encoded["offset_mapping"][room][0] :] if fast else str(tokenizer.decode(ids[room:]))


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else f"{prompt[:40]}…"
