"""Shared by the pipelines with dynamic chunking: their own arguments, and their report."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from fastgen.accounting import Stats, note_path
from fastgen.checks import check_bool
from fastgen.contracts import Loss
from fastgen.errors import FastgenError
from fastgen.models.chunking import Chunks
from fastgen.models.elastic import ElasticBudget, ElasticModelMixin, Schedule, StepRecord
from fastgen.pipelines.pickling import PickledMixin
from fastgen.pipelines.summary import reported
from fastgen.pretrained import load_pretrained

logger = logging.getLogger(__name__)

LOSS: Loss = "lossy"
"""Loss contract of the pipelines: a separate model; its budget trades quality for compute."""


@dataclass
class DCPipelineOutput(BaseOutput):
    """Pictures, and what making them took.

    Args:
        images: as the stock pipeline returns them.
        stats: what the call did: passes, kept tokens per step, seconds.
        steps: latents and kept tokens of each step when asked for: conditional samples first, then unconditional
            ones.
    """

    images: list[Image.Image] | Any
    stats: Stats
    steps: list[StepRecord] | None = None

    @property
    def chunks(self) -> list[Chunks] | None:
        """Kept tokens of each step."""
        return None if self.steps is None else [record.chunks for record in self.steps]


class DCPipelineMixin(PickledMixin):
    """Loading of pipelines with dynamic chunking. `from_pipe` of another pipeline class leaves a transformer of this
    kind out, as its class is not the one that the other pipeline names: here it says what it needs."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As in diffusers; code that comes with a model is refused."""
        return load_pretrained(super(), pretrained_model_name_or_path, **kwargs)

    @property
    def components(self) -> dict[str, Any]:
        caller = sys._getframe(1)
        if caller.f_code.co_name == "from_pipe":
            known = caller.f_locals
            accepted = known.get("component_types", {}).get("transformer", ())
            given = known.get("passed_class_obj", {})
            if "transformer" not in given and type(self.transformer) not in accepted:  # type: ignore[attr-defined]
                raise FastgenError(
                    "from_pipe: does not take a transformer with dynamic chunking by itself; pass it: "
                    "from_pipe(pipe, transformer=pipe.transformer), and set its budget with fastgen.enable_dc"
                )
        return super().components  # type: ignore[misc]


def run_elastic(
    pipe: DiffusionPipeline,
    stock: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    output_chunks: bool,
    **knobs: Any,
) -> DCPipelineOutput | tuple[Any]:
    """Call a stock pipeline with a budget of this call; its own arguments were checked (`stock_arguments.check_call`).

    Raises:
        ValueError: a knob out of range; or knobs with a transformer that has no dynamic chunking.
    """
    return_dict = arguments.pop("return_dict", True)
    check_bool("output_chunks", output_chunks)
    budget = ElasticBudget(**knobs, images=images_of(arguments))
    with reported(pipe) as stats, ExitStack() as stack:
        transformer = stack.enter_context(elastic_generation(pipe, budget))
        records = stack.enter_context(transformer.record_chunks()) if output_chunks else None
        note_path("transformer", "dynamic chunking")
        (pictures,) = stock(**arguments, return_dict=False)
    return DCPipelineOutput(images=pictures, stats=stats, steps=records) if return_dict else (pictures,)


@contextmanager
def elastic_generation(pipe: Any, budget: ElasticBudget) -> Iterator[ElasticModelMixin]:
    """One generation of a pipeline: what its transformer computes in this context has this budget.

    Raises:
        ValueError: its transformer has no dynamic chunking.
    """
    transformer = _elastic(pipe.transformer)
    with transformer.generation(budget, lambda: _loop_length(pipe)), transformer.caches():
        yield transformer


def _elastic(transformer: Any) -> ElasticModelMixin:
    """A transformer with dynamic chunking, also inside `torch.compile`.

    Raises:
        ValueError: it has no dynamic chunking.
    """
    inner = getattr(transformer, "_orig_mod", transformer)
    if not isinstance(inner, ElasticModelMixin):
        raise FastgenError(
            f"transformer: {type(inner).__name__} has no dynamic chunking; use the stock pipeline (after "
            "fastgen.disable_dc), or fastgen.upcycle and training"
        )
    if inner is not transformer and _budget_outside not in transformer._forward_pre_hooks.values():
        transformer.register_forward_pre_hook(_budget_outside, with_kwargs=True)
    return inner


def _budget_outside(compiled: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, compiled._orig_mod.with_budget(args, kwargs)


def images_of(arguments: dict[str, Any]) -> int | None:
    """The number of pictures that a call of a stock pipeline draws; None where its arguments do not show it."""
    classes, prompt, embeds = (arguments.get(name) for name in ("class_labels", "prompt", "prompt_embeds"))
    if classes is not None:
        return len(classes)
    given = embeds if prompt is None else prompt
    if given is None:
        return None
    prompts = 1 if isinstance(given, str) else len(given)
    return prompts * int(arguments.get("num_images_per_prompt") or 1)


def _loop_length(pipe: Any) -> int:
    """Steps of the denoising loop that has just begun: fewer than asked for with `strength`, more with schedulers of
    several evaluations a step."""
    steps = getattr(pipe, "_num_timesteps", None)
    return len(pipe.scheduler.timesteps) if steps is None else int(steps)


@dataclass(slots=True)
class _Enabled:
    """The state of `enable_dc` in a pipeline.

    Attributes:
        budget: of its calls.
        original: the transformer before, where it was replaced.
    """

    budget: ElasticBudget
    original: Any = None


class _EnabledMixin(DCPipelineMixin):
    """A stock pipeline class that calls with the budget of `enable_dc`."""

    _stock: type[DiffusionPipeline]
    _fastgen_dc: _Enabled

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class has no name to be found by
        return _blank, (self._stock,), self.__getstate__()


def _blank(stock: type) -> Any:
    return object.__new__(_enabled_class(stock))


@cache
def _enabled_class(stock: type[DiffusionPipeline]) -> type:
    """The class of an enabled pipeline: named as the stock one, so that what is saved has its name."""
    call: Callable[..., Any] = stock.__call__
    signature = inspect.signature(call)

    @wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        budget = self._fastgen_dc.budget
        images = images_of(signature.bind(self, *args, **kwargs).arguments)
        if None not in (images, budget.images) and images != budget.images:
            raise FastgenError(f"images: {budget.images} was set by enable_dc, and this call draws {images}")
        with elastic_generation(self, budget):
            return call(self, *args, **kwargs)

    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (_EnabledMixin, stock), {**names, "__call__": __call__, "_stock": stock})


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

    The budget belongs to the calls of this pipeline: other pipelines with the same transformer, in other threads too,
    keep theirs. Calling it again sets another budget. A budget by step begins with the first step of every call.
    Pickled and copied pipelines come back enabled; a pipeline loaded from a saved folder comes back plain.

    Args:
        pipe: a pipeline with a transformer of the same interface.
        transformer: a transformer with dynamic chunking in place of the pipeline's; None where it has one.
        tail_drop, uncond_tail_drop, token_budget, images: see `fastgen.models.elastic.ElasticBudget`; a stock pipeline
            does not tell which half of a batch is unconditional, so `uncond_tail_drop` needs `images`, the number of
            pictures of a call.

    Raises:
        ValueError: there is no transformer with dynamic chunking, or a knob is out of range.
    """
    if not isinstance(pipe, DiffusionPipeline) or not hasattr(pipe, "transformer"):
        raise FastgenError(f"pipe: {type(pipe).__name__} is not a diffusers pipeline with a transformer")
    if "tail_drop" in inspect.signature(type(pipe).__call__).parameters:
        raise FastgenError(
            f"pipe: {type(pipe).__name__} takes tail_drop, uncond_tail_drop and token_budget in its calls; enable_dc "
            "is for stock pipelines"
        )
    chunked = pipe.transformer if transformer is None else transformer
    inner = getattr(chunked, "_orig_mod", chunked)
    if not isinstance(inner, ElasticModelMixin):
        raise FastgenError(f"transformer: {type(inner).__name__} has no dynamic chunking; see fastgen.upcycle")
    budget = ElasticBudget(tail_drop, uncond_tail_drop, token_budget, images)
    if uncond_tail_drop is not None and images is None:
        raise FastgenError("uncond_tail_drop: needs images, the number of pictures of a call")
    enabled = vars(pipe).get("_fastgen_dc") or _Enabled(budget)
    enabled.budget = budget
    if chunked is not pipe.transformer:
        _check_interface(pipe.transformer, inner)
        enabled.original = enabled.original or pipe.transformer
        pipe.register_modules(transformer=chunked)
    pipe._fastgen_dc = enabled
    if not isinstance(pipe, _EnabledMixin):
        stock: Any = type(pipe)
        pipe.__class__ = _enabled_class(stock)


def disable_dc(pipe: DiffusionPipeline) -> None:
    """Undo `enable_dc`: the pipeline's own transformer, or the whole natural set again. Harmless when not enabled."""
    if not isinstance(pipe, DiffusionPipeline):
        raise FastgenError(f"pipe: {type(pipe).__name__} is not a diffusers pipeline")
    if not isinstance(pipe, _EnabledMixin):
        return
    original, stock = vars(pipe).pop("_fastgen_dc").original, pipe._stock
    pipe.__class__ = stock
    if original is not None:
        stock.register_modules(pipe, transformer=original)


def budget_of(pipe: Any) -> ElasticBudget | None:
    """The budget that a stock pipeline computes with, that of `enable_dc`; None for none."""
    enabled = vars(pipe).get("_fastgen_dc")
    return None if enabled is None else enabled.budget


def _check_interface(stock: Any, chunked: Any) -> None:
    """See that one transformer can take the other's place.

    Raises:
        ValueError: names what differs.
    """
    if not isinstance(stock, ElasticModelMixin) and type(stock).__name__ not in chunked._replaces:
        raise FastgenError(
            f"transformer: {type(chunked).__name__} takes the place of {' or '.join(chunked._replaces)}, not of "
            f"{type(stock).__name__}"
        )
    for name in ("in_channels", "cap_feat_dim"):
        own, other = (model.config.get(name) for model in (chunked, stock))
        if own != other:
            raise FastgenError(f"transformer: has {name} {own}, and this pipeline needs {other}")
