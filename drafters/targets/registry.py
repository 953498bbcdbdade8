"""The adapter of each model class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from diffusers import VQModel
from torch import Tensor

from fastgen.checks import check_callable, check_integer
from fastgen.drafters.targets.base import Target, unit_range
from fastgen.errors import FastgenError

__all__ = ["register_target", "target_of"]

TargetFactory = Callable[..., Target]


def _janus(model: Any, tokenizer: Any) -> Target:
    from fastgen.drafters.targets.janus import JanusTarget

    return JanusTarget(model, tokenizer)


def _llamagen(model: Any, tokenizer: Any) -> Target:
    from fastgen.drafters.targets.llamagen import LlamaGenTarget

    return LlamaGenTarget(model, tokenizer)


def _emu3(model: Any, tokenizer: Any, size: Any = (90, 90), negative: str = "") -> Target:
    from fastgen.drafters.targets.vocabulary import Emu3Target

    return Emu3Target(model, tokenizer, _size(size), negative)


def _chameleon(
    model: Any,
    tokenizer: Any,
    size: Any = (32, 32),
    line_end: int | None = None,
    begin: list[int] | None = None,
    decode: Any = None,
) -> Target:
    from fastgen.drafters.targets.vocabulary import ChameleonTarget

    last = int(model.lm_head.out_features) - 1
    if line_end is not None:
        check_integer("line_end", line_end, 0, last)
    if begin is not None:
        if not isinstance(begin, list | tuple) or not begin:
            raise FastgenError(f"begin: {begin!r} is not allowed, needs a list of token ids")
        begin = [check_integer("begin", each, 0, last) for each in begin]
    if isinstance(decode, VQModel):
        decode = _decoder(decode, int(model.model.vqmodel.quantize.embedding.num_embeddings))
    check_callable("decode", decode)
    return ChameleonTarget(model, tokenizer, _size(size), line_end, begin, decode)


def _decoder(network: VQModel, codes: int) -> Callable[[Tensor], Tensor]:
    """A function from codes to pictures, by a network of diffusers."""
    held = int(network.config.num_vq_embeddings)
    if held != codes:
        raise FastgenError(f"decode: this VQModel has {held} codes, the model {codes}")

    def decode(tokens: Tensor) -> Tensor:
        here = network.to(tokens.device)
        vectors = here.quantize.get_codebook_entry(tokens.flatten(), (*tokens.shape, -1))
        decoded: Tensor = here.decode(vectors.to(here.dtype), force_not_quantize=True).sample
        return unit_range(decoded.permute(0, 2, 3, 1))

    return decode


def _glm_image(model: Any, tokenizer: Any, **options: Any) -> Target:
    from fastgen.drafters.targets.glm_image import INSIDE_ITS_PIPELINE

    raise FastgenError(INSIDE_ITS_PIPELINE)


def _size(size: Any) -> tuple[int, int]:
    """Height and width in tokens; JSON gives a list."""
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise FastgenError(f"size: {size!r} is not allowed, needs height and width in tokens")
    return check_integer("size", size[0], 1), check_integer("size", size[1], 1)


_FACTORIES: dict[str, TargetFactory] = {
    "ChameleonForConditionalGeneration": _chameleon,
    "Emu3ForConditionalGeneration": _emu3,
    "GlmImageForConditionalGeneration": _glm_image,
    "JanusForConditionalGeneration": _janus,
    "LlamaGen": _llamagen,
}


def register_target(class_name: str, factory: TargetFactory) -> None:
    """Use `factory(model, tokenizer, **options)` for models of a class and its subclasses."""
    _FACTORIES[class_name] = factory


def target_of(model: Any, tokenizer: Any, **options: Any) -> Target:
    """The adapter of a loaded model.

    Args:
        model: e.g. `transformers.JanusForConditionalGeneration`.
        tokenizer: its tokenizer or processor.
        options: of the adapter (`size` of Emu3 and Chameleon …).

    Raises:
        FastgenError: there is no adapter for this class, or it does not take an option or its value.
    """
    for base in type(model).__mro__:
        if base.__name__ in _FACTORIES:
            factory = _FACTORIES[base.__name__]
            try:
                inspect.signature(factory).bind(model, tokenizer, **options)
            except TypeError as error:
                raise FastgenError(f"options: {type(model).__name__} does not take {sorted(options)}") from error
            return factory(model, getattr(tokenizer, "tokenizer", tokenizer), **options)
    known = ", ".join(sorted(name for name, factory in _FACTORIES.items() if factory is not _glm_image))
    raise FastgenError(f"model: {type(model).__name__} has no adapter; supported are {known}")
