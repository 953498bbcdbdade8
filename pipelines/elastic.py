"""What the pipelines with dynamic chunking share: knobs beside the stock arguments, and what they report."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput
from PIL import Image

from fastgen.accounting import Stats, account, note_path
from fastgen.contracts import Loss
from fastgen.models.chunking import Chunks
from fastgen.models.elastic import ElasticModelMixin, Schedule

KNOBS: dict[str, Any] = {"tail_drop": 0.0, "uncond_tail_drop": None, "token_budget": None, "output_chunks": False}
"""Names and defaults of what the pipelines take beside the stock arguments."""


@dataclass
class DCPipelineOutput(BaseOutput):
    """Pictures, and what making them took.

    Args:
        images: as the stock pipeline returns them.
        stats: passes, kept tokens per step, seconds (`fastgen.accounting.Stats`).
        chunks: one `Chunks` per step when asked for: conditional samples first, then unconditional ones.
    """

    images: list[Image.Image] | Any
    stats: Stats | None = None
    chunks: list[Chunks] | None = None


def with_knobs(stock: Callable[..., Any]) -> inspect.Signature:
    """The signature of a stock `__call__` with the knobs of dynamic chunking as keyword arguments."""
    signature = inspect.signature(stock)
    knobs = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default) for name, default in KNOBS.items()
    ]
    return signature.replace(parameters=[*signature.parameters.values(), *knobs])


def run_elastic(
    transformer: Any,
    stock: Callable[..., Any],
    arguments: dict[str, Any],
    images: int,
    steps: int | None,
    tail_drop: Schedule,
    uncond_tail_drop: Schedule | None,
    token_budget: int | None,
    output_chunks: bool,
) -> DCPipelineOutput | tuple[Any]:
    """Call a stock pipeline with a budget set on its transformer, and put the transformer back as it was.

    Raises:
        ValueError: a knob out of range; or knobs with a transformer that has no dynamic chunking.
    """
    return_dict = arguments.pop("return_dict", True)
    if not isinstance(transformer, ElasticModelMixin):
        raise ValueError(
            f"transformer: {type(transformer).__name__} has no dynamic chunking; use the stock pipeline, or "
            "fastgen.upcycle and training"
        )
    before = transformer._budget
    transformer.set_budget(
        tail_drop, uncond_tail_drop=uncond_tail_drop, token_budget=token_budget, images=images, steps=steps
    )
    try:
        with account() as stats, transformer.record_chunks() as chunks:
            note_path("transformer", "dynamic chunking")
            (pictures,) = stock(**arguments, return_dict=False)
    finally:
        transformer._budget = before
    if not return_dict:
        return (pictures,)
    return DCPipelineOutput(images=pictures, stats=stats, chunks=list(chunks) if output_chunks else None)


LOSS: Loss = "lossy"
"""Loss contract of both pipelines: a model of its own; its budget trades quality for compute."""
