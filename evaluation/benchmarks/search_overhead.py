"""What wrapping a pipeline for noise search adds to its call while the search is off."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap

from fastgen.accounting import wait_for
from fastgen.checks import check_integer
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.measure import percentiles, result_of
from fastgen.evaluation.benchmarks.search_variants import call_of
from fastgen.evaluation.runner import spread
from fastgen.evaluation.shapesworld import shapes_prompts
from fastgen.pipelines.checkpoint import find_checkpoint
from fastgen.pipelines.loading import load_checkpoint
from fastgen.pipelines.noise_search import NoiseSearchPipeline
from fastgen.pipelines.prompts import check_prompt_lengths
from fastgen.pipelines.settings import check_classes

__all__ = ["benchmark_search_overhead"]

STOCK, WRAPPED, CONTROL = "stock", "wrapped, no policy", "stock again"


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
        report: told what is going on.

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
    rows = [_row(name, seconds[name], seconds[STOCK]) for name in calls]
    return result_of(
        "search-overhead", {"model": model, "runs": runs, "device": device, "dtype": dtype, **call}, rows=rows
    )


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
