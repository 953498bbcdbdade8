"""Which adapter serves which model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastgen.drafters.targets.base import Target
from fastgen.errors import FastgenError

__all__ = ["register_target", "target_of"]

TargetFactory = Callable[..., Target]


def _janus(model: Any, tokenizer: Any) -> Target:
    from fastgen.drafters.targets.janus import JanusTarget

    return JanusTarget(model, tokenizer)


def _llamagen(model: Any, tokenizer: Any) -> Target:
    from fastgen.drafters.targets.llamagen import LlamaGenTarget

    return LlamaGenTarget(model, tokenizer)


def _emu3(model: Any, tokenizer: Any, **options: Any) -> Target:
    from fastgen.drafters.targets.vocabulary import Emu3Target

    return Emu3Target(model, tokenizer, **options)


def _chameleon(model: Any, tokenizer: Any, **options: Any) -> Target:
    from fastgen.drafters.targets.vocabulary import ChameleonTarget

    return ChameleonTarget(model, tokenizer, **options)


_FACTORIES: dict[str, TargetFactory] = {
    "ChameleonForConditionalGeneration": _chameleon,
    "Emu3ForConditionalGeneration": _emu3,
    "JanusForConditionalGeneration": _janus,
    "LlamaGen": _llamagen,
}


def register_target(class_name: str, factory: TargetFactory) -> None:
    """Let `factory(model, tokenizer, **options)` serve models of a class (and of its subclasses)."""
    _FACTORIES[class_name] = factory


def target_of(model: Any, tokenizer: Any, **options: Any) -> Target:
    """The adapter of a model that the user has loaded.

    Args:
        model: e.g. `transformers.JanusForConditionalGeneration`.
        tokenizer: its tokenizer or processor.
        options: of the adapter (`size` of Emu3 and Chameleon …).

    Raises:
        ValueError: no adapter serves this class, or it does not take an option.
    """
    for base in type(model).__mro__:
        if base.__name__ in _FACTORIES:
            try:
                return _FACTORIES[base.__name__](model, getattr(tokenizer, "tokenizer", tokenizer), **options)
            except TypeError as error:
                if not options:
                    raise
                raise ValueError(f"options: {type(model).__name__} does not take {sorted(options)}") from error
    known = ", ".join(sorted(_FACTORIES))
    raise FastgenError(f"model: {type(model).__name__} is no target that we know; there are {known}")
