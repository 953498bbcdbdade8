"""One call for many prompts and seeds, as `generate_images` is, with a search for each picture."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fastgen.accounting import account, count_flops, current, note_path
from fastgen.pipelines.generation import GeneratedImage, Progress
from fastgen.pipelines.noise_search import NoFinitePicture, NoiseSearchPipeline, SamplerName, SearchInterrupted
from fastgen.pipelines.prompts import check_prompt_lengths
from fastgen.pipelines.search.budget import Budget
from fastgen.pipelines.search.engine import Round
from fastgen.pipelines.search.policy import Policy
from fastgen.pipelines.search.previews import PreviewOption
from fastgen.pipelines.search.samplers import Sampler
from fastgen.pipelines.settings import pipeline_arguments

__all__ = ["search_images"]

_PARTS = 1000  # of which `Progress` tells how many are done


def search_images(
    pipe: Any,
    verifier: Any,
    policy: Policy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    budget: Budget,
    sampler: SamplerName | Sampler | None = None,
    preview: PreviewOption = "full",
    batch_size: int = 8,
    batch_invariant: bool = False,
    flops: bool = False,
    callback: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> Iterator[GeneratedImage]:
    """Search for picture i with prompts[i] and seeds[i]; pictures are yielded in order, as soon as they are found.

    Where a search is cut short, the best pictures until then are yielded, marked as interrupted, before the error is
    raised; where one of them has no picture that is a number, the others are yielded before that error.

    Args:
        pipe: a diffusers pipeline with an adapter.
        verifier, policy, sampler, preview: see `NoiseSearchPipeline`; None as sampler is its default.
        prompts, seeds: of equal length.
        budget: of each picture; pictures that are searched for together share their seconds.
        batch_size: pictures that are searched for together, and rows of a forward pass, at most.
        batch_invariant: the same prompt, seed and settings give the same pixels for every batch size and whatever the
            other pictures are (same machine, same number of threads; no limit of seconds): one picture at a time, one
            row at a time. False finds the same only up to rounding, and faster where a policy tries several at once.
        flops: count FLOPs as well; takes some time.
        callback: called after every round of evaluations.
        settings: `steps`, `guidance_scale`, `height`, `width`, `negative_prompt`, and what else the adapter takes.

    Raises:
        ValueError: an argument out of range, or a budget smaller than one picture takes.
        NotFiniteError: for one of the pictures all candidates were dropped, as not a number.
        SearchInterrupted: the model, the verifier or the user ended the search.
    """
    check_prompt_lengths(pipe, [*prompts, *([settings["negative_prompt"]] if settings.get("negative_prompt") else [])])
    search = NoiseSearchPipeline(pipe, verifier, policy)
    size = 1 if batch_invariant else batch_size
    for start in range(0, len(prompts), size):
        texts, own = prompts[start : start + size], seeds[start : start + size]
        seconds = None if budget.max_seconds is None else budget.max_seconds * len(texts)
        output: Any
        cause: NoFinitePicture | SearchInterrupted | None = None
        with account() as stats, count_flops() if flops else contextlib.nullcontext():
            note_path(
                "batch",
                "one row at a time" if batch_invariant else f"up to {batch_size} rows and pictures together",
                "batch_invariant: rounding depends on the batch shape" if batch_invariant and batch_size > 1 else None,
            )
            try:
                output = search(
                    list(texts),
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in own],
                    max_nfe=budget.max_nfe,
                    max_seconds=seconds,
                    target_score=budget.target_score,
                    sampler=sampler or "ancestral",
                    preview=preview,
                    batch_size=size,
                    on_round=_reporter(callback, start, len(prompts), len(texts), budget, seconds),
                    pipeline_kwargs=pipeline_arguments(settings),
                )
            except (NoFinitePicture, SearchInterrupted) as error:
                output, cause = error.output, error
        if output is not None:
            interrupted = isinstance(cause, SearchInterrupted)
            places = cause.found if isinstance(cause, NoFinitePicture) else range(len(texts))
            for i, image, report in zip(places, output.images, output.reports, strict=True):
                found = {"verifier": _name(verifier), **report.as_dict()}
                yield GeneratedImage(
                    image,
                    texts[i],
                    own[i],
                    stats,
                    len(texts),
                    search.loss,
                    search=found,
                    interrupted=interrupted,
                )
        if cause is not None:
            raise cause


def _name(thing: Any) -> str | None:
    """The name of a verifier or a sampler in results."""
    if thing is None or isinstance(thing, str):
        return thing
    return getattr(thing, "name", None) or getattr(thing, "__name__", type(thing).__name__)


def _reporter(
    callback: Callable[[Progress], None] | None,
    done: int,
    total: int,
    count: int,
    budget: Budget,
    seconds: float | None,
) -> Callable[[Round], None] | None:
    """Tells a callback which part of the budget is spent, and what was evaluated."""
    if callback is None:
        return None
    started = time.perf_counter()

    def report(found: Round) -> None:
        stats = current()
        parts = [0.0 if found.running else 1.0]
        if budget.max_nfe is not None and stats is not None:
            parts.append(stats.nfe / (budget.max_nfe * count))
        if seconds is not None:
            parts.append((time.perf_counter() - started) / seconds)
        visits = [(prompt, chain, visit.row()) for prompt, chain, visit in found.visits]
        callback(Progress(done, total, count, round(_PARTS * min(max(parts), 1.0)), _PARTS, visits=visits))

    return report
