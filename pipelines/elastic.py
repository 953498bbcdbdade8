"""What the pipelines with dynamic chunking share: knobs beside the stock arguments, and what they report."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from fastgen.accounting import Stats, account, note_path
from fastgen.contracts import Loss
from fastgen.models.chunking import Chunks
from fastgen.models.elastic import ElasticModelMixin, Schedule, StepRecord

KNOBS: dict[str, Any] = {"tail_drop": 0.0, "uncond_tail_drop": None, "token_budget": None, "output_chunks": False}
"""Names and defaults of what the pipelines take beside the stock arguments."""


@dataclass
class DCPipelineOutput(BaseOutput):
    """Pictures, and what making them took.

    Args:
        images: as the stock pipeline returns them.
        stats: passes, kept tokens per step, seconds (`fastgen.accounting.Stats`).
        steps: latents and kept tokens of each step when asked for: conditional samples first, then unconditional
            ones.
    """

    images: list[Image.Image] | Any
    stats: Stats | None = None
    steps: list[StepRecord] | None = None

    @property
    def chunks(self) -> list[Chunks] | None:
        """Kept tokens of each step."""
        return None if self.steps is None else [record.chunks for record in self.steps]


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
        caches = transformer.cache_context("denoise") if transformer.is_caching else nullcontext()
        with account() as stats, transformer.record_chunks() as records, caches:
            note_path("transformer", "dynamic chunking")
            (pictures,) = stock(**arguments, return_dict=False)
    finally:
        transformer._budget = before
        transformer._reset_stateful_cache()  # also after an interrupted generation, which the next must not go on from
    if not return_dict:
        return (pictures,)
    return DCPipelineOutput(images=pictures, stats=stats, steps=list(records) if output_chunks else None)


_originals: weakref.WeakKeyDictionary[DiffusionPipeline, Any] = weakref.WeakKeyDictionary()


def enable_dc(
    pipe: DiffusionPipeline,
    transformer: torch.nn.Module | None = None,
    *,
    tail_drop: Schedule = 0.0,
    uncond_tail_drop: Schedule | None = None,
    token_budget: int | None = None,
    images: int | None = None,
) -> None:
    """Make a stock pipeline compute fewer tokens; `disable_dc` gives it back as it was. Loss contract: lossy.

    Calling it again sets another budget.

    Args:
        pipe: a pipeline with a transformer of the same interface.
        transformer: a transformer with dynamic chunking in place of the pipeline's; None where it has one.
        tail_drop, uncond_tail_drop, token_budget, images: see `fastgen.models.elastic.ElasticBudget`; a stock pipeline
            does not tell which half of a batch is unconditional, so `uncond_tail_drop` needs `images`.

    Raises:
        ValueError: there is no transformer with dynamic chunking, or a knob is out of range.
    """
    chunked = transformer if transformer is not None else getattr(pipe, "transformer", None)
    if not isinstance(chunked, ElasticModelMixin):
        raise ValueError(f"transformer: {type(chunked).__name__} has no dynamic chunking; see fastgen.upcycle")
    if uncond_tail_drop is not None and images is None:
        raise ValueError("uncond_tail_drop: needs images, the number of pictures of a call")
    chunked.set_budget(tail_drop, uncond_tail_drop=uncond_tail_drop, token_budget=token_budget, images=images)
    if transformer is not None and transformer is not pipe.transformer:
        _originals.setdefault(pipe, pipe.transformer)
        pipe.register_modules(transformer=transformer)


def disable_dc(pipe: DiffusionPipeline) -> None:
    """Undo `enable_dc`: the pipeline's own transformer, or the whole natural set again. Harmless when not enabled."""
    if pipe in _originals:
        pipe.register_modules(transformer=_originals.pop(pipe))
    elif isinstance(getattr(pipe, "transformer", None), ElasticModelMixin):
        pipe.transformer.reset_budget()


LOSS: Loss = "lossy"
"""Loss contract of both pipelines: a model of its own; its budget trades quality for compute."""
