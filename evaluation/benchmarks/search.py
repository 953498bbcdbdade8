"""Noise search: score against forward passes and against seconds, for all policies at several budgets.

Every prompt is searched on its own, as a user waits for one picture; its seconds are from the call to the picture,
with text encoder, decoder and verifier. All policies at all budgets take turns on a prompt before the next one, so
that a slow moment of the machine affects all of them. The checker that scores is not the verifier that is searched.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastgen.accounting import account, wait_for
from fastgen.checks import check_integer
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.measure import result_of
from fastgen.evaluation.benchmarks.search_rows import rows_of, statistics_of
from fastgen.evaluation.benchmarks.search_statistics import Resampling
from fastgen.evaluation.benchmarks.search_variants import (
    NONE,
    VARIANTS,
    Search,
    Variant,
    call_of,
    parse_variant,
    scaled,
)
from fastgen.evaluation.geneval.metadata import Metadata
from fastgen.evaluation.geneval.shapes_checker import fingerprint, load_detector
from fastgen.evaluation.runner import image_seed, model_fingerprint
from fastgen.evaluation.shapesworld import shapes_prompts
from fastgen.evaluation.verifiers.base import Verifier
from fastgen.evaluation.verifiers.names import VERIFIERS, load_verifier
from fastgen.io import atomic_write_json, atomic_write_many, check_writable, encode_json, encode_png, read_object
from fastgen.pipelines.loading import load_checkpoint
from fastgen.pipelines.loading.checkpoint import Checkpoint, find_checkpoint
from fastgen.pipelines.noise_search import NoiseSearchPipeline, SearchInterrupted
from fastgen.pipelines.prompts import check_prompt_lengths
from fastgen.pipelines.search.denoisers.base import Settings, denoiser_of
from fastgen.pipelines.settings import check_classes

__all__ = ["BUDGETS", "SEEDS", "VARIANTS", "benchmark_search"]

BUDGETS = (48, 100, 200, 350, 500)
SEEDS = 3
_FORMAT = 1


@dataclass(frozen=True)
class Bench:
    """Shared by all searches.

    Attributes:
        pipe, verifier: of the searches.
        call: arguments of every call of the pipeline.
        search: further arguments of every search.
        forwards, times: forward passes of an evaluation, and evaluations of a trajectory.
    """

    pipe: Any
    verifier: Verifier
    call: dict[str, Any]
    search: dict[str, Any]
    forwards: int
    times: int


def benchmark_search(
    model: str,
    folder: Path,
    *,
    variant: str | None = None,
    verifier: str = "shapes-verifier",
    heldout: str | None = None,
    policies: Sequence[str] = VARIANTS,
    budgets: Sequence[int] = BUDGETS,
    seeds: int = SEEDS,
    limit: int | None = None,
    sampler: str = "ancestral",
    batch_size: int = 32,
    device: str = "cpu",
    dtype: str = "auto",
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        model: a diffusion pipeline that draws ShapesWorld.
        folder: of the pictures and of what every search did; a killed run resumes there, and so does one with more
            prompts, seeds, policies or budgets.
        variant: of the weight files, as in diffusers.
        verifier: that is searched.
        heldout: another one, which scores the pictures that were found.
        policies: see `parse_variant`; the pipeline without a search is always measured.
        budgets: forward passes of the model on one sample, for each prompt.
        seeds: searches of each prompt.
        limit: how many prompts of each task, from the first.
        sampler: see `NoiseSearchPipeline.__call__`.
        batch_size: rows of a forward pass.
        device, dtype: of the model; the verifiers run there in their own precision.
        report: called with each line of progress.

    Returns:
        a JSON-ready dict: "environment", "detector", "settings", "skipped" (pairs of policy and
        budget that are not possible, with the reason), "rows" (see `rows_of`), "comparisons" and "reach" (see
        `statistics_of`).

    Raises:
        ValueError: a number out of range, a model or verifier that cannot be loaded, an invalid policy, or a
            folder with searches under other settings.
    """
    for name, number in (("seeds", seeds), ("batch_size", batch_size), *(("budgets", budget) for budget in budgets)):
        check_integer(name, number, 1)
    variants = [parse_variant(text) for text in dict.fromkeys((NONE, *policies))]
    prompts = _numbered(limit)
    checkpoint = find_checkpoint(model, variant)
    if checkpoint.kind != "diffusers":
        raise FastgenError(f"model: {model} is no diffusion pipeline")
    check_classes(checkpoint, (item.prompt for _, item in prompts))
    asked, held = load_verifier(verifier, device), None if heldout is None else load_verifier(heldout, device)
    detector = load_detector(device=device)
    bench = _bench(checkpoint, asked, {"sampler": sampler, "batch_size": batch_size}, device, dtype)
    check_prompt_lengths(bench.pipe, [item.prompt for _, item in prompts])
    record = {
        "format": _FORMAT,
        "model": model_fingerprint(*checkpoint.folders),
        **({} if variant is None else {"variant": variant}),
        "verifier": _identity(asked),
        **bench.call,
        **bench.search,
        "device": device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }
    searches, skipped = _plan(bench, variants, sorted(set(budgets)), folder)
    for entry in skipped:
        report(f"left out: {entry['policy']} at {entry['budget']}: {entry['reason']}")
    _open(folder, record, searches)
    _run(bench, searches, prompts, seeds, report)
    report("score")
    by = Resampling([item.tag for _, item in prompts])
    rows = rows_of(searches, prompts, seeds, detector, asked, held, by, device)
    settings = {
        "model": model,
        "verifier": _label(verifier, asked),
        "heldout": None if heldout is None or held is None else _label(heldout, held),
        "seeds": seeds,
        "prompts": len(prompts),
        "budgets": sorted(set(budgets)),
        "forwards": bench.forwards,
        "times": bench.times,
        **{key: value for key, value in record.items() if key not in ("format", "model", "verifier")},
    }
    found = {"rows": [row.data for row in rows], **statistics_of(rows, by)}
    return result_of("search", settings, detector=fingerprint(detector), skipped=skipped, **found)


def _numbered(limit: int | None) -> list[tuple[int, Metadata]]:
    """The prompts with their places in the whole evaluation set."""
    places = {item.prompt: place for place, item in enumerate(shapes_prompts())}
    return [(places[item.prompt], item) for item in shapes_prompts(limit)]


def _identity(verifier: Verifier) -> str:
    network = getattr(verifier, "model", None)
    return verifier.name if network is None else f"{verifier.name} {fingerprint(network)}"


def _label(text: str, verifier: Verifier) -> str:
    """A verifier for the reader: weights from a folder by their fingerprint."""
    return text if text in VERIFIERS else _identity(verifier)[: len(verifier.name) + 9]


def _bench(checkpoint: Checkpoint, verifier: Verifier, search: dict[str, Any], device: str, dtype: str) -> Bench:
    pipe: Any = load_checkpoint(checkpoint, device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    call = call_of(checkpoint)
    with torch.no_grad():
        denoiser = denoiser_of(pipe)(pipe, [""], Settings(**call))
    return Bench(pipe, verifier, call, search, denoiser.forwards, len(denoiser.times))


def _plan(
    bench: Bench, variants: Sequence[Variant], budgets: Sequence[int], folder: Path
) -> tuple[list[Search], list[dict[str, Any]]]:
    """The rows, and what cannot be one."""
    searches, skipped = [], []
    for variant in variants:
        if variant.policy == NONE:
            searches.append(Search(variant, None, NoiseSearchPipeline(bench.pipe, policy=None), folder / NONE))
            continue
        for budget in budgets if variant.max_nfe is None else [variant.max_nfe]:
            try:
                policy = scaled(variant, budget, bench.forwards, bench.times)
            except ValueError as error:
                skipped.append({"policy": variant.name, "budget": budget, "reason": str(error)})
                continue
            made = NoiseSearchPipeline(bench.pipe, bench.verifier, policy, thresholds=variant.thresholds)
            name = re.sub(r"[^\w.=+-]", "-", variant.name)
            searches.append(Search(variant, budget, made, folder / f"{name}@{budget}"))
    return searches, skipped


def _open(folder: Path, record: dict[str, Any], searches: Sequence[Search]) -> None:
    """Make the folders, or resume in those of the same settings."""
    check_writable(folder)
    for place, wanted in ((folder, record), *((search.folder, search.settings) for search in searches)):
        file = place / "settings.json"
        if not file.is_file():
            check_writable(place)
            if any(not item.name.startswith(".") for item in place.iterdir()):
                raise FastgenError(f"{place}: is not empty and has no searches; choose another folder")
            atomic_write_json(file, wanted)
        held = read_object(file)
        changed = [key for key in {**held, **wanted} if held.get(key) != wanted.get(key)]
        if changed:
            differences = "; ".join(f"{key} is {held.get(key)!r} there and {wanted.get(key)!r} now" for key in changed)
            raise FastgenError(f"{place}: has searches with other settings ({differences}); choose another folder")


def _run(
    bench: Bench,
    searches: Sequence[Search],
    prompts: Sequence[tuple[int, Metadata]],
    seeds: int,
    report: Callable[[str], None],
) -> None:
    """Every search that has no record yet."""
    todo = list(_missing(searches, prompts, seeds))
    if not todo:
        return
    report("warm-up")
    warm: dict[str, Search] = {}
    for search in searches:
        warm.setdefault(search.variant.name, search)  # at its smallest budget
    for search in warm.values():
        _search(bench, search, prompts[0][1].prompt, 0)
    started = time.perf_counter()
    for done, (search, place, item, seed) in enumerate(todo):
        if done and todo[done - 1][1:] != (place, item, seed):
            left = (time.perf_counter() - started) / done * (len(todo) - done)
            report(f"{done} of {len(todo)} searches, {left / 60:.0f} min left")
        picture, found = _search(bench, search, item.prompt, image_seed(0, item.prompt, seed))
        path = search.picture(place, seed)
        found |= {"prompt": item.prompt, "seed": seed}
        atomic_write_many([(path, encode_png(picture)), (path.with_suffix(".json"), encode_json(found))])


def _missing(
    searches: Sequence[Search], prompts: Sequence[tuple[int, Metadata]], seeds: int
) -> Iterator[tuple[Search, int, Metadata, int]]:
    """All prompts before the next seed. Which row begins changes from prompt to prompt: the first one reads the prompt
    for the verifier, which keeps it."""
    for seed in range(seeds):
        for turn, (place, item) in enumerate(prompts):
            first = (turn + seed) % len(searches)
            for search in (*searches[first:], *searches[:first]):
                path = search.picture(place, seed)
                if not (path.is_file() and path.with_suffix(".json").is_file()):
                    yield search, place, item, seed


def _search(bench: Bench, search: Search, prompt: str, seed: int) -> tuple[Image.Image, dict[str, Any]]:
    """The picture, and its cost."""
    generator, searched = torch.Generator().manual_seed(seed), search.pipeline.policy is not None
    arguments = {**bench.search, "max_nfe": search.budget, **search.variant.arguments} if searched else {}
    started = time.perf_counter()
    try:
        with account() as stats:
            output = search.pipeline(prompt, generator=generator, pipeline_kwargs=bench.call, **arguments)
            wait_for(torch.device(bench.pipe.device))
    except SearchInterrupted as error:
        raise (error.__cause__ or error) from None
    found: dict[str, Any] = {"seconds": time.perf_counter() - started, "phases": stats.seconds}
    if not searched:
        plain = {"nfe": bench.forwards * bench.times, "evaluations": bench.times, "tries_by_time": [1] * bench.times}
        fixed = {"policy": NONE, "verifier_calls": 0, "forced": 0, "finished": True, "stopped": "finished"}
        return output.images[0], {**found, **plain, **fixed}
    summary = output.reports[0].as_dict()
    kept = ("policy", "nfe", "evaluations", "forced", "finished", "tries_by_time", "stopped")
    return output.images[0], {
        **found,
        **{name: summary[name] for name in kept},
        "verifier_calls": stats.verifier_calls,
    }
