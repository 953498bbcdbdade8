"""Time of every fused kernel against its reference, eager and compiled, at the sizes of real models.

A kernel that does not pass its check is not timed, and no speed-up is given for it. On a CPU there is nothing to
compare but the references themselves.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.kernel_case import Case, Inputs
from fastgen.evaluation.benchmarks.kernel_cases import cases
from fastgen.evaluation.benchmarks.kernel_timing import (
    WARM_UP,
    Timing,
    roofline,
    time_calls,
    time_on_cpu,
    time_on_gpu,
)
from fastgen.evaluation.benchmarks.kernels_end_to_end import MODELS, benchmark_end_to_end
from fastgen.evaluation.benchmarks.measure import result_of
from fastgen.kernels.dispatch import ran, reset_ran, use_kernels

__all__ = ["benchmark_kernels"]

_SHORT = 1e-3  # seconds; of longer work the launches are no part worth measuring


def benchmark_kernels(
    ops: Sequence[str] | None = None,
    *,
    device: str = "cpu",
    compile: bool = True,
    end_to_end: bool = False,
    seconds: float = 140.0,
    report: Callable[[str], None] = lambda line: None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        ops: names of operations, or with `end_to_end` beginnings of names of models; None takes all.
        device: where; on a CPU only small sizes, and no kernels.
        compile: measure the compiled reference as well.
        end_to_end: instead of the operations, measure steps of whole models (`kernels_end_to_end`).
        seconds: after this time, references are no longer compiled, and the rows say so.
        report: called with each line of progress.
        save: called with the result after every row, so that an interrupted run keeps its rows.

    Returns:
        a JSON-ready dict: "finished", "environment", "settings", "seconds", "roofline" and "rows" with op, size, moved
        bytes, the check, times of "eager", "compiled" and "triton" (or null), speed-ups against both references (null
        where the check failed), "calls" (wall time of a call of each, launches counted), bytes a second, its share
        of the roofline, and what "auto" takes.

    Raises:
        FastgenError: an unknown operation; models without a CUDA device.
    """
    everything = cases()
    known = list(MODELS) if end_to_end else sorted({case.op for case in everything})
    chosen = _chosen(ops, known, end_to_end)
    place = torch.device(device)
    started = time.perf_counter()
    settings = {**_settings(device, place), "compile": compile, "warm_up": WARM_UP}
    result = result_of("kernels-end-to-end" if end_to_end else "kernels", settings, finished=False, rows=[])

    def add(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        result["seconds"] = time.perf_counter() - started
        save(result)

    if end_to_end:
        benchmark_end_to_end(place, chosen, seconds=seconds, report=report, add=add)
    else:
        result["roofline"] = limits = roofline(place)
        for case in everything:
            if case.op not in chosen or (place.type != "cuda" and not case.on_cpu):
                continue
            report(f"{case.op}: {case.size}")
            late = time.perf_counter() - started > seconds
            row = _measure(case, place, limits, compile and not late)
            if late and compile:
                row["note"] = "the compiled reference was left out: the time was up"
            add(row)
    result["finished"] = True
    save(result)
    return result


def _chosen(ops: Sequence[str] | None, known: Sequence[str], beginnings: bool) -> list[str]:
    """The known names that are asked for, by a whole name or a prefix."""

    def meant(name: str, op: str) -> bool:
        return name.startswith(op) if beginnings else name == op

    for op in ops or ():
        if not any(meant(name, op) for name in known):
            raise FastgenError(f"op: {op!r} is unknown; there are {', '.join(known)}")
    return [name for name in known if not ops or any(meant(name, op) for op in ops)]


def _settings(device: str, place: torch.device) -> dict[str, Any]:
    settings: dict[str, Any] = {"device": device, "baseline": "eager and compiled, without kernels"}
    if place.type == "cuda":
        properties = torch.cuda.get_device_properties(place)
        settings |= {"gpu": properties.name, "driver": _driver(), "l2_bytes": properties.L2_cache_size}
    return settings


@torch.no_grad()
def _measure(case: Case, device: torch.device, limits: dict[str, float | None], compile: bool) -> dict[str, Any]:
    inputs = case.build(device)
    moved = case.moved(inputs)
    flops = None if case.flops is None else case.flops(inputs)
    row: dict[str, Any] = {
        "op": case.op,
        "size": case.size,
        "large": case.large,
        "moved_bytes": moved,
        "flops": flops,
        "check": "no GPU" if device.type != "cuda" else _check(case, inputs),
        "auto": _auto(case, inputs),
    }
    works = _implementations(case, inputs, row, compile)
    with use_kernels("triton" if device.type == "cuda" else "reference"):
        timings = time_on_gpu(works) if device.type == "cuda" else time_on_cpu(works)
        if device.type == "cuda":
            short = {name: work for name, work in works.items() if timings[name]["p50"] < _SHORT}
            row["calls"] = time_calls(short)
    row |= {name: timings.get(name) for name in ("eager", "compiled", "triton")}
    best = row["triton"] or row["compiled"] or row["eager"]
    row["bytes_per_second"] = moved / best["p50"]
    row["roofline_share"] = row["bytes_per_second"] / (limits["bytes_per_second"] or float("nan"))
    if flops is not None:
        row["flops_per_second"] = flops / best["p50"]
        peak = limits["flops_per_second"]
        row["flops_share"] = None if peak is None else row["flops_per_second"] / peak
    return row | _speedups(timings)


def _implementations(
    case: Case, inputs: Inputs, row: dict[str, Any], compile: bool
) -> dict[str, Callable[[], object]]:
    """The functions to time: the references, and the kernel only where its check in `row` has passed."""
    works: dict[str, Callable[[], object]] = {"eager": lambda: case.reference(**inputs)}
    if compile and case.compiled:
        torch._dynamo.reset()
        compiled = torch.compile(case.reference, dynamic=False)
        start = time.perf_counter()
        try:
            compiled(**inputs)
            works["compiled"] = lambda: compiled(**inputs)
        except Exception as error:  # a compiler may fail in any way; the row says so and the other rows are measured
            row["compile_error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        row["compile_seconds"] = time.perf_counter() - start
    if row["check"] == "passed":
        works["triton"] = lambda: case.run(**inputs)
    return works


def _speedups(timings: dict[str, Timing]) -> dict[str, float | None]:
    """Speed-ups of the kernel against both references; None where one was not timed."""

    def ratio(name: str) -> float | None:
        if name not in timings or "triton" not in timings:
            return None
        return float(timings[name]["p50"] / timings["triton"]["p50"])

    return {"speedup_eager": ratio("eager"), "speedup_compiled": ratio("compiled")}


def _check(case: Case, inputs: Any) -> str:
    """ "passed", or why the kernel's result must not be timed."""
    expect = case.expect or case.reference
    wide = inputs if case.expect is not None else {name: _wide(value) for name, value in inputs.items()}
    try:
        with use_kernels("reference"):
            expected = expect(**wide)
        with use_kernels("triton"):
            result = case.run(**inputs)
        wrong = case.check(result, expected)
    except Exception as error:  # a kernel that does not run is a row of the table, not the end of the benchmark
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return "passed" if wrong is None else f"failed: {wrong}"


def _auto(case: Case, inputs: Any) -> str | None:
    """The choice of mode "auto" for these inputs."""
    reset_ran()
    try:
        with use_kernels("auto"):
            case.run(**inputs)
    except Exception as error:
        return f"failed: {type(error).__name__}"
    found = ran()
    return found.get(case.op) or next(iter(found.values()), None)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None
