"""What a noise search adds: to a stock call when the search is off, and to an evaluation of the model."""

from __future__ import annotations

import inspect
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
from fastgen.pipelines.checkpoint import find_checkpoint
from fastgen.pipelines.loading import load_checkpoint
from fastgen.pipelines.noise_search import NoiseSearchPipeline
from fastgen.pipelines.prompts import check_prompt_lengths
from fastgen.pipelines.search.denoisers.base import Denoiser, Settings, denoiser_of
from fastgen.pipelines.search.denoisers.stock import StockDenoiser
from fastgen.pipelines.settings import check_classes

__all__ = ["benchmark_search_overhead"]

STOCK, WRAPPED, CONTROL = "stock", "wrapped, no policy", "stock again"
FAMILY, OWN = "adapter of the family", "the pipeline's own call"
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
    calls: dict[str, Callable[..., Any]] = {
        STOCK: pipe,
        WRAPPED: NoiseSearchPipeline(pipe, policy=None),
        CONTROL: pipe,
    }
    check_prompt_lengths(pipe, chosen)
    report("warm-up")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(-1, runs):
        order = list(calls)[run % 3 :] + list(calls)[: run % 3]
        pictures = {}
        for name in order:
            generator = torch.Generator().manual_seed(run + 1)
            started = time.perf_counter()
            output = calls[name](chosen[run % len(chosen)], generator=generator, output_type="np", **call)
            wait_for(torch.device(pipe.device))
            if run >= 0:
                seconds[name].append(time.perf_counter() - started)
            pictures[name] = output.images
        if not np.array_equal(pictures[STOCK], pictures[WRAPPED]):
            raise FastgenError("the wrapped pipeline draws other pictures than the stock one; nothing is reported")
    report("evaluations")
    evaluations: list[dict[str, Any]] = []
    if "prompt" in inspect.signature(type(pipe).__call__).parameters and hasattr(pipe, "transformer"):
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
    one, in turns; and how much of it is not the model.

    Args:
        name: of the model.
        pipe: a pipeline of text prompts.
        call: settings of a picture.
        rounds: after one of warm-up; each evaluates all times of the schedule with every path.

    Returns:
        rows with model, path, n, seconds of an evaluation (percentiles), host (processor seconds of the calling
        thread outside the model, which other processes do not lengthen; percentiles), host_ci (95 % of its median),
        above (median and 95 % of it: host seconds more than the family's adapter at the same time of the same round;
        None where there is no adapter) and share (of a stock call, on a CPU in processor seconds as well; of medians).
    """
    settings, adapter = Settings(**call), denoiser_of(pipe)
    paths: dict[str, Denoiser] = {OWN: StockDenoiser(pipe, ["a red circle"], settings)}
    if adapter is not StockDenoiser:
        paths[FAMILY] = adapter(pipe, ["a red circle"], settings)
    start, which = paths[OWN].noise(torch.Generator().manual_seed(0)), torch.tensor([0])
    seconds: dict[str, list[float]] = {path: [] for path in paths}
    host: dict[str, list[float]] = {path: [] for path in paths}
    calls: list[float] = []
    clock = time.thread_time if torch.device(pipe.device).type == "cpu" else time.perf_counter
    with _timed(pipe.transformer) as inside:
        for run in range(-1, rounds):
            for place, moment in enumerate(paths[OWN].times):
                for path in list(paths) if (run + place) % 2 else reversed(paths):
                    inside.clear()
                    started, busy = time.perf_counter(), time.thread_time()
                    paths[path].predict(start, torch.tensor([moment], dtype=torch.float64), which)
                    busy = time.thread_time() - busy
                    wait_for(torch.device(pipe.device))
                    if run >= 0:
                        seconds[path].append(time.perf_counter() - started)
                        host[path].append(busy - sum(inside))
            started = clock()
            pipe("a red circle", generator=torch.Generator().manual_seed(0), output_type="np", **call)
            wait_for(torch.device(pipe.device))
            if run >= 0:
                calls.append(clock() - started)
    return [
        {
            "model": name,
            "path": path,
            "n": len(seconds[path]),
            "seconds": percentiles(seconds[path]),
            "host": percentiles(host[path]),
            "host_ci": _median_ci(np.array(host[path])),
            "above": _above(host[path], host.get(FAMILY)) if path != FAMILY else None,
            "share": float(np.median(host[path]) / np.median(calls)),
        }
        for path in paths
    ]


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


def _above(host: list[float], family: list[float] | None) -> list[float] | None:
    if family is None:
        return None
    more = np.array(host) - np.array(family)
    return [float(np.median(more)), *_median_ci(more)]


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
