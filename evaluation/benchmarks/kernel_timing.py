"""Time of GPU kernels: events around each repetition with the cache flushed, or many repetitions in a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fastgen.evaluation.benchmarks.measure import percentiles, seconds_of, take_turns

__all__ = ["WARM_UP", "Timing", "roofline", "time_calls", "time_on_cpu", "time_on_gpu", "walls"]

WARM_UP = 25
REPETITIONS = 100
_CYCLES = 2e9  # of a GPU's clock in a second, or fewer
_FLUSH = 256 * 2**20  # bytes; more than any second-level cache
_GRAPH_BELOW = 20e-6
_GRAPH_CALLS = 20
_CALLS, _CALL_ROUNDS = 20, 15

Timing = dict[str, Any]
"""Seconds "p20", "p50", "p80", and "method"."""


def time_on_gpu(works: Mapping[str, Callable[[], object]], seconds: float = 1.0) -> dict[str, Timing]:
    """Time several implementations of the same work, taking turns.

    Each repetition overwrites the cache, holds the GPU back until the work is queued, and lies between two events, so
    that the GPU is measured and not the launch. When any of them takes less than 20 microseconds, all are
    measured as CUDA graphs of 20 calls instead (cache warm).

    Args:
        works: implementation -> a call of it.
        seconds: roughly the longest that one implementation may take.
    """
    for work in works.values():
        for _ in range(WARM_UP):
            work()
    torch.cuda.synchronize()
    asleep = int(_CYCLES * min(0.02, max(1e-4, 1.5 * max(_host_seconds(work) for work in works.values()))))
    scratch = torch.empty(_FLUSH, dtype=torch.int8, device="cuda")
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in works}
    started = time.perf_counter()
    for repetition in range(REPETITIONS):
        for name, work in works.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            scratch.zero_()
            torch.cuda._sleep(asleep)
            start.record()
            work()
            end.record()
            marks[name].append((start, end))
        if repetition % 10 == 9:
            torch.cuda.synchronize()
            if repetition >= 19 and time.perf_counter() - started > seconds * len(works):
                break
    torch.cuda.synchronize()
    found = {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in marks.items()}
    del scratch
    timings: dict[str, Timing] = {
        name: {**percentiles(values), "method": "events", "repetitions": len(values)} for name, values in found.items()
    }
    if min(timing["p50"] for timing in timings.values()) >= _GRAPH_BELOW:
        return timings
    graphs = {name: _graph(work) for name, work in works.items()}
    if any(graph is None for graph in graphs.values()):
        return timings  # one of them asks the host: all stay measured in the same way
    return {name: _time_graph(graph) for name, graph in graphs.items() if graph is not None}


def _host_seconds(work: Callable[[], object]) -> float:
    """How long the host needs to queue it: the GPU has to be held back for longer."""
    seconds = []
    for _ in range(3):
        seconds.append(seconds_of(work))
        torch.cuda.synchronize()
    return max(seconds)


def time_calls(works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median wall time of a call among `_CALLS` in a row, from an idle GPU to an idle GPU, taking turns.

    What a program pays that is neither compiled nor captured: where launches take longer than the work, this is the
    time of the launches. Call it after `time_on_gpu`, which warms up.
    """
    rows = {name: partial(_repeated, work) for name, work in works.items()}
    turns = take_turns(rows, _CALL_ROUNDS, warm_up=0, device=torch.device("cuda"))
    return {name: percentiles(found)["p50"] / _CALLS for name, found in turns.items()}


def _repeated(work: Callable[[], object]) -> None:
    for _ in range(_CALLS):
        work()


def _graph(work: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    """The work `_GRAPH_CALLS` times in a graph, or None if it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(_GRAPH_CALLS):
                work()
    except (RuntimeError, torch.AcceleratorError):
        torch.cuda.synchronize()
        return None
    return graph


def _time_graph(graph: torch.cuda.CUDAGraph) -> Timing:
    values = []
    for repetition in range(5 + REPETITIONS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(50_000)
        start.record()
        graph.replay()
        end.record()
        if repetition % 20 == 4:
            torch.cuda.synchronize()
        if repetition >= 5:
            values.append((start, end))
    torch.cuda.synchronize()
    seconds = [start.elapsed_time(end) / 1e3 / _GRAPH_CALLS for start, end in values]
    return {**percentiles(seconds), "method": "graph", "repetitions": len(seconds)}


def time_on_cpu(works: Mapping[str, Callable[[], object]], seconds: float = 1.0) -> dict[str, Timing]:
    """Wall time of several implementations, taking turns; fewer repetitions of slow ones."""
    slowest = max(seconds[-1] for seconds in take_turns(works, 3, warm_up=0).values())
    return walls(take_turns(works, max(5, min(REPETITIONS, int(seconds / slowest))), warm_up=0))


def walls(seconds: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    """Wall times of every implementation as timings."""
    return {
        name: {**percentiles(found), "method": "wall", "repetitions": len(found)} for name, found in seconds.items()
    }


def roofline(device: torch.device) -> dict[str, float | None]:
    """Peak rates of the device: bytes a second of a large copy (read and written), and FLOP/s of a large bfloat16
    matrix product (GPU only)."""
    if device.type != "cuda":
        source = torch.ones(64 * 2**20, dtype=torch.int8)
        copied = torch.empty_like(source)
        timing = time_on_cpu({"copy": lambda: copied.copy_(source)})["copy"]
        return {"bytes_per_second": 2 * source.numel() / timing["p50"], "flops_per_second": None}
    source = torch.ones(2**30, dtype=torch.int8, device=device)
    copied = torch.empty_like(source)
    side = 8192
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    timings = time_on_gpu({"copy": lambda: copied.copy_(source), "matmul": lambda: left @ right})
    return {
        "bytes_per_second": 2 * source.numel() / timings["copy"]["p50"],
        "flops_per_second": 2 * side**3 / timings["matmul"]["p50"],
    }
