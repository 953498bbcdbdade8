"""Which adapter serves which model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastgen.drafters.targets.base import Target

__all__ = ["register_target", "target_of"]

TargetFactory = Callable[[Any, Any], Target]


def _janus(model: Any, tokenizer: Any) -> Target:
    from fastgen.drafters.targets.janus import JanusTarget

    return JanusTarget(model, tokenizer)


def _llamagen(model: Any, tokenizer: Any) -> Target:
    from fastgen.drafters.targets.llamagen import LlamaGenTarget

    return LlamaGenTarget(model, tokenizer)


_FACTORIES: dict[str, TargetFactory] = {"JanusForConditionalGeneration": _janus, "LlamaGen": _llamagen}


def register_target(class_name: str, factory: TargetFactory) -> None:
    """Let `factory(model, tokenizer)` serve models of a class (and of its subclasses)."""
    _FACTORIES[class_name] = factory


def target_of(model: Any, tokenizer: Any) -> Target:
    """The adapter of a model that the user has loaded.

    Args:
        model: e.g. `transformers.JanusForConditionalGeneration`.
        tokenizer: its tokenizer or processor.

    Raises:
        ValueError: no adapter serves this class.
    """
    for base in type(model).__mro__:
        if base.__name__ in _FACTORIES:
            return _FACTORIES[base.__name__](model, getattr(tokenizer, "tokenizer", tokenizer))
    known = ", ".join(sorted(_FACTORIES))
    raise ValueError(f"model: {type(model).__name__} is no target that we know; there are {known}")
