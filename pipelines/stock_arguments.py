"""Arguments of stock pipelines, checked before anything runs: types, ranges, and lengths of lists."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from fastgen.checks import (
    check_bool,
    check_callable,
    check_choice,
    check_generator,
    check_integer,
    check_number,
)
from fastgen.errors import FastgenError

__all__ = ["check_call", "check_labels", "check_texts", "defaults_of", "given_arguments"]


def defaults_of(pipeline: type) -> dict[str, Any]:
    """Defaults of `pipeline.__call__`, by argument."""
    call: Any = pipeline.__call__
    return {name: value.default for name, value in inspect.signature(call).parameters.items()}


def given_arguments(stock: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a call's arguments that the stock `__call__` takes and that differ from its defaults."""
    defaults = defaults_of(stock)
    del defaults["self"]
    return {name: values[name] for name, default in defaults.items() if name in values and values[name] is not default}


def check_texts(name: str, value: Any, count: int | None = None) -> None:
    """A text or a list of texts, of `count` of them.

    Raises:
        FastgenError: it is neither, or a list of another length.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise FastgenError(f"{name}: {value!r} is not allowed, needs a text or a list of texts")
    if count is not None and not isinstance(value, str) and len(texts) != count:
        raise FastgenError(f"{name}: {len(texts)} texts for {count} prompts; needs one, or one each")


def check_labels(labels: Any, classes: int) -> int:
    """How many classes a list of numbers of classes has; the last number is that of "no class".

    Raises:
        FastgenError: it is no such list.
    """
    numbers = labels.tolist() if isinstance(labels, torch.Tensor) and labels.ndim == 1 else labels
    if not isinstance(numbers, list | tuple) or not numbers:
        raise FastgenError(f"class_labels: {labels!r} is not allowed, needs a list of numbers of classes")
    for number in numbers:
        check_integer("class_labels", number, 0, classes)
    return len(numbers)


def check_call(arguments: Mapping[str, Any], images: int, output_types: tuple[str, ...]) -> None:
    """Check what `__call__` of a stock pipeline was given, all but prompts and classes.

    Args:
        arguments: by name.
        images: that are to be drawn.
        output_types: that the pipeline has.

    Raises:
        FastgenError: names the argument, its value and what is allowed.
    """
    for name, value in arguments.items():
        if value is not None and name in _CHECKS:
            _CHECKS[name](name, value)
    if "guidance_scale" in arguments:
        check_number("guidance_scale", arguments["guidance_scale"])
    check_generator(arguments.get("generator"), images)
    check_choice("output_type", arguments.get("output_type", "pil"), output_types)
    check_bool("return_dict", arguments.get("return_dict", True))
    check_callable("callback_on_step_end", arguments.get("callback_on_step_end"))


def _check_kind(name: str, value: object, kind: type, needed: str) -> None:
    if not isinstance(value, kind):
        raise FastgenError(f"{name}: {type(value).__name__} is not allowed, needs {needed}")


def _check_embeds(name: str, value: Any) -> None:
    rows = isinstance(value, list | tuple) and all(isinstance(row, torch.Tensor) for row in value)
    if not rows:
        raise FastgenError(f"{name}: {type(value).__name__} is not allowed, needs a list of tensors, one per prompt")


def _check_sigmas(name: str, sigmas: Any) -> None:
    if isinstance(sigmas, str) or not hasattr(sigmas, "__len__") or not len(sigmas):
        raise FastgenError(f"{name}: {sigmas!r} is not allowed, needs a list of numbers")
    for sigma in sigmas:
        check_number(name, float(sigma) if hasattr(sigma, "item") else sigma)


_COUNTS = ("height", "width", "num_inference_steps", "num_images_per_prompt", "max_sequence_length")
_CHECKS: dict[str, Callable[[str, Any], object]] = {
    **dict.fromkeys(_COUNTS, partial(check_integer, minimum=1)),
    "cfg_truncation": check_number,
    "latents": partial(_check_kind, kind=torch.Tensor, needed="a tensor"),
    "prompt_embeds": _check_embeds,
    "negative_prompt_embeds": _check_embeds,
    "sigmas": _check_sigmas,
    "joint_attention_kwargs": partial(_check_kind, kind=dict, needed="a dict"),
}
"""Argument -> what is asked of its value where one is given."""
