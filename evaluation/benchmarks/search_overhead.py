"""What a noise search adds: to a stock call when the search is off, and to an evaluation of the model."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap

from fastgen.accounting import wait_for
from fastgen.checks import check_integer
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.flux_shaped import flux_shaped
from fastgen.evaluation.benchmarks.measure import percentiles, result_of
from fastgen.evaluation.benchmarks.search_variants import call_of
from fastgen.evaluation.runner import spread
from fastgen.evaluation.shapesworld import shapes_prompts
from fastgen.pipelines.loading import load_checkpoint
from fastgen.pipelines.loading.checkpoint import find_checkpoint
from fastgen.pipelines.noise_search import NoiseSearchPipeline
from fastgen.pipelines.prompts import check_prompt_lengths
from fastgen.pipelines.search.denoisers.base import Denoiser, Settings, denoiser_of
from fastgen.pipelines.search.denoisers.stock import StockDenoiser
from fastgen.pipelines.settings import check_classes
from fastgen.pipelines.stock_arguments import defaults_of

__all__ = ["benchmark_search_overhead"]

STOCK, WRAPPED, CONTROL = "stock", "wrapped, no policy", "stock again"
STEP, FAMILY, OWN = "a step of the stock call", "adapter of the family", "the pipeline's own call"
FLUX_CALL = {"height": 256, "width": 256, "num_inference_steps": 4, "guidance_scale": 3.5}


def benchmark_search_overhead(
    model: str,
    *,
    variant: str | None = None,
    runs: int = 30,
    device: str = "cpu",
    dtype: str = "auto",
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        model: a diffusion pipeline.
        variant: of the weight files, as in diffusers.
        runs: rounds after one of warm-up; each draws one picture with every call, and begins with another one.
        device, dtype: of the model.
        report: called with each line of progress.

    Returns:
        a JSON-ready dict: "environment", "settings" and "rows" with call, n, seconds (percentiles), ratio (to the
        stock call of the same round; percentiles) and ratio_ci (95 % of its median).

    Raises:
        FastgenError: runs < 2, a model that cannot be had, or pictures that are not the stock call's.
    """
    check_integer("runs", runs, 2)
    checkpoint = find_checkpoint(model, variant)
    if checkpoint.kind != "diffusers":
        raise FastgenError(f"model: {model} is no diffusion pipeline")
    prompts = shapes_prompts()
    chosen = [prompts[index].prompt for index in spread(len(prompts), runs)]
    check_classes(checkpoint, chosen)
    pipe: Any = load_checkpoint(checkpoint, device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    call = call_of(checkpoint)
    search = NoiseSearchPipeline(pipe, policy=None)

    def wrapped(prompt: str, generator: torch.Generator, **arguments: Any) -> Any:
        return search(prompt, generator=generator, output_type="np", pipeline_kwargs=arguments)

    stock = functools.partial(pipe, output_type="np")
    calls: dict[str, Callable[..., Any]] = {STOCK: stock, WRAPPED: wrapped, CONTROL: stock}
    check_prompt_lengths(pipe, chosen)
    report("warm-up")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(-1, runs):
        order = list(calls)[run % 3 :] + list(calls)[: run % 3]
        pictures = {}
        for name in order:
            generator = torch.Generator().manual_seed(run + 1)
            started = time.perf_counter()
            output = calls[name](chosen[run % len(chosen)], generator=generator, **call)
            wait_for(torch.device(pipe.device))
            if run >= 0:
                seconds[name].append(time.perf_counter() - started)
            pictures[name] = output.images
        if not np.array_equal(pictures[STOCK], pictures[WRAPPED]):
            raise FastgenError("the wrapped pipeline draws other pictures than the stock one; nothing is reported")
    report("evaluations")
    evaluations: list[dict[str, Any]] = []
    if {"prompt", "callback_on_step_end"} <= defaults_of(type(pipe)).keys() and hasattr(pipe, "transformer"):
        evaluations = evaluation_rows(model, pipe, call, runs)
    if model == "tiny":
        shaped = flux_shaped().to(device)
        shaped.set_progress_bar_config(disable=True)
        evaluations += evaluation_rows("FLUX-shaped, one block of each kind", shaped, FLUX_CALL, min(runs, 5))
    settings = {"model": model, "runs": runs, "device": device, "dtype": dtype, **call}
    rows = [_row(name, seconds[name], seconds[STOCK]) for name in calls]
    return result_of("search-overhead", settings, rows=rows, evaluations=evaluations)


def evaluation_rows(name: str, pipe: Any, call: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """What one evaluation of the model takes by the pipeline's own call, and by the family's adapter where there is
    one, and what a step of the stock call takes, in turns; and how much of it is not the model.

    What counts is the processor time of the calling thread outside the model's forward pass, which other processes do
    not lengthen. Of an evaluation that is all that a search does for it but previews and scores: entering the call,
    its checks, schedule and loop, guidance, the clean sample. Of a stock step it is what lies between the ends of two
    steps of one call: guidance and the scheduler's step; what the call does once (texts, schedule, decoding) is not in
    it. An evaluation takes the place of a step, so the difference of the two is what a search adds.

    Args:
        name: of the model.
        pipe: a pipeline of text prompts.
        call: settings of a picture.
        rounds: after one of warm-up; each evaluates all times of the schedule but the first with every path.

    Returns:
        rows with model, path, n, seconds (percentiles), host (processor seconds outside the model; percentiles),
        host_ci (95 % of its median), share (of the seconds of a stock step; of medians), and two
        differences, each the median and 95 % of it, at the same place of the same round: above_adapter (None where
        there is none) and above_step.
    """
    settings, adapter = Settings(**call), denoiser_of(pipe)
    paths: dict[str, Denoiser] = {OWN: StockDenoiser(pipe, ["a red circle"], settings)}
    if adapter is not StockDenoiser:
        paths[FAMILY] = adapter(pipe, ["a red circle"], settings)
    start, which = paths[OWN].noise(torch.Generator().manual_seed(0)), torch.tensor([0])
    times = paths[OWN].times[1:]
    seconds: dict[str, list[float]] = {path: [] for path in (STEP, *paths)}
    host: dict[str, list[float]] = {path: [] for path in (STEP, *paths)}
    with _timed(pipe.transformer) as inside:
        for run in range(-1, rounds):
            for place, moment in enumerate(times):
                for path in list(paths) if (run + place) % 2 else reversed(paths):
                    inside.clear()
                    started, busy = time.perf_counter(), time.thread_time()
                    paths[path].predict(start, torch.tensor([moment], dtype=torch.float64), which)
                    busy = time.thread_time() - busy
                    wait_for(torch.device(pipe.device))
                    if run >= 0:
                        seconds[path].append(time.perf_counter() - started)
                        host[path].append(busy - sum(inside))
            lasted, busied = _stock_steps(pipe, call, inside)
            if run >= 0:
                seconds[STEP] += lasted
                host[STEP] += busied
    step = float(np.median(seconds[STEP]))
    return [
        {
            "model": name,
            "path": path,
            "n": len(found),
            "seconds": percentiles(seconds[path]),
            "host": percentiles(found),
            "host_ci": _median_ci(np.array(found)),
            "share": float(np.median(found)) / step,
            "above_adapter": _above(found, host.get(FAMILY)) if path == OWN else None,
            "above_step": None if path == STEP else _above(found, host[STEP]),
        }
        for path, found in host.items()
    ]


def _above(host: list[float], other: list[float] | None) -> list[float] | None:
    if other is None:
        return None
    more = np.array(host) - np.array(other)
    return [float(np.median(more)), *_median_ci(more)]


def _stock_steps(pipe: Any, call: dict[str, Any], inside: list[float]) -> tuple[list[float], list[float]]:
    """Seconds of each step of a stock call but the first, and the processor seconds of it outside the model."""
    device = torch.device(pipe.device)
    ends: list[tuple[float, float]] = []

    def note(pipe: Any, step: int, moment: Any, given: dict[str, Any]) -> dict[str, Any]:
        busy = time.thread_time() - sum(inside)
        wait_for(device)
        ends.append((time.perf_counter(), busy))
        return given

    inside.clear()
    generator = torch.Generator().manual_seed(0)
    pipe("a red circle", generator=generator, output_type="np", callback_on_step_end=note, **call)
    lasted, busied = np.diff(np.array(ends), axis=0).T
    return lasted.tolist(), busied.tolist()


@contextmanager
def _timed(model: Any) -> Iterator[list[float]]:
    """Processor seconds of each forward pass of the model inside."""
    found: list[float] = []
    began: list[float] = []

    def before(*_: Any) -> None:
        began.append(time.thread_time())

    def after(*_: Any) -> None:
        found.append(time.thread_time() - began.pop())

    handles = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _median_ci(values: Any) -> list[float]:
    found = bootstrap(
        (values,), np.median, method="percentile", random_state=np.random.default_rng(0)
    ).confidence_interval
    return [float(found.low), float(found.high)]


def _row(name: str, seconds: list[float], stock: list[float]) -> dict[str, Any]:
    ratios = np.array(seconds) / np.array(stock)
    ends = [1.0, 1.0] if name == STOCK else _median_ci(ratios)
    return {
        "call": name,
        "n": len(seconds),
        "seconds": percentiles(seconds),
        "ratio": percentiles(ratios.tolist()),
        "ratio_ci": ends,
    }
