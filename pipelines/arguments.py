"""Checks of what a user asks for that need no model. Imports neither torch nor diffusers."""

from __future__ import annotations

from fastgen.checks import check_choice, check_integer, check_number
from fastgen.drafters.names import RULES, check_temperature, check_tree_name
from fastgen.errors import FastgenError

__all__ = ["SEARCH_SETTINGS", "SETTINGS", "check_prompt", "check_value"]

#: What a picture depends on beside prompt, seed and model, by the names of `generate_images` and of the command line.
SETTINGS = (
    "steps",
    "guidance_scale",
    "height",
    "width",
    "negative_prompt",
    "temperature",
    "top_k",
    "top_p",
    "tail_drop",
    "uncond_tail_drop",
    "token_budget",
    "tree",
    "acceptance",
    "quality",
)

#: What the picture of a search depends on beside those, by the names of the command line.
SEARCH_SETTINGS = (
    "policy",
    "verifier",
    "max_nfe",
    "max_seconds",
    "target_score",
    "sampler",
    "tau",
    "starts",
    "chains",
    "explore",
    "explore_uncond",
    "preview",
)

_COUNTS = ("steps", "height", "width", "top_k", "token_budget", "max_nfe", "starts", "chains")
_NUMBERS = ("guidance_scale", "target_score", "tau")
_LARGEST = 2**31 - 1


def check_prompt(prompt: object, label: str = "prompt") -> str:
    """Refuse what is not a text that a model can be given.

    Raises:
        FastgenError: says what is wrong.
    """
    if not isinstance(prompt, str):
        raise FastgenError(f"{label}: needs a text, got {type(prompt).__name__}")
    if not prompt.strip():
        raise FastgenError(f"{label}: an empty text is not allowed")
    # Lone surrogates are what Python makes of bytes that are not UTF-8.
    if any(0xD800 <= ord(char) <= 0xDFFF or (ord(char) < 32 and char not in "\t\n\r") for char in prompt):
        raise FastgenError(f"{label}: {ascii(prompt)} is not text: it holds control characters or undecodable bytes")
    return prompt


def check_value(label: str, name: str, value: object) -> None:
    """Refuse a value that no pipeline can take.

    Args:
        label: how the message calls it.
        name: one of `SETTINGS` or of `SEARCH_SETTINGS`.

    Raises:
        FastgenError: `label`, the value and what is allowed.
    """
    if name in _COUNTS:
        check_integer(label, value, 1, _LARGEST)
    elif name == "temperature":
        check_temperature(label, value)
    elif name == "top_p":
        check_number(label, value, above=0, maximum=1)
    elif name == "max_seconds":
        check_number(label, value, above=0)
    elif name in _NUMBERS:
        check_number(label, value, -_LARGEST, _LARGEST)
    elif name in ("tail_drop", "uncond_tail_drop", "explore", "explore_uncond"):
        # Lists and functions of the step are checked by the pipeline.
        if isinstance(value, str | bool | int | float):
            check_number(label, value, 0, below=1)
    elif name == "quality":
        check_number(label, value, 0, 1)
    elif name == "acceptance":
        check_choice(label, value, RULES)
    elif name == "tree":
        # Trees themselves, not their names, are checked by the pipeline.
        if isinstance(value, str):
            check_tree_name(label, value)
    elif name == "preview":
        check_choice(label, value, ("full", "pooled"))
    else:
        check_prompt(value, label)
