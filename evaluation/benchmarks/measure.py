"""Shared by all benchmarks: interleaved calls, percentiles, whole processes, and the frame of a result."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastgen.accounting import wait_for
from fastgen.environment import environment
from fastgen.errors import FastgenError

Name = TypeVar("Name")


def result_of(benchmark: str, settings: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A JSON-ready result with the machine and the versions that gave it."""
    return {"benchmark": benchmark, "environment": environment(), "settings": settings, **parts}


def seconds_of(call: Callable[[], object], device: Any = None) -> float:
    """Wall time of a call; on a `device` from when it is idle until it is idle again."""
    wait = (lambda: None) if device is None else partial(wait_for, device)
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def take_turns(
    calls: Mapping[Name, Callable[[], object]], rounds: int, *, warm_up: int = 1, device: Any = None
) -> dict[Name, list[float]]:
    """Seconds of every call in every round. In a round each call runs once, so that a slow moment of the machine meets
    all of them; rounds of warm-up are not counted."""
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            taken = seconds_of(call, device)
            if turn >= warm_up:
                seconds[name].append(taken)
    return seconds


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile, with linear interpolation between the sorted values."""
    return dict(zip(("p20", "p50", "p80"), np.percentile(values, (20, 50, 80)).tolist(), strict=True))


def measure_process(command: Sequence[str]) -> tuple[float, int | None, str]:
    """Run a command to its end.

    Returns:
        wall seconds, peak resident bytes (None where the system does not say), standard output.

    Raises:
        FastgenError: it failed; the message has its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder, "measured.json")
        done = subprocess.run(
            [sys.executable, "-c", _LAUNCHER, str(measured), *command],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            raise FastgenError(f"{' '.join(command[:6])} … failed with {done.returncode}: {lines[-1:]}")
        seconds, peak = json.loads(measured.read_text())
    # The unit is kibibytes on Linux and bytes on macOS.
    return seconds, None if peak is None else peak * (1 if sys.platform == "darwin" else 1024), done.stdout


# A small process between us and the measured one: Linux counts the memory of the process that starts another one as
# a part of the peak of the latter, and ours may have gigabytes.
_LAUNCHER = """
import json, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[2:])
seconds, peak = time.perf_counter() - start, None
try:
    import resource
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
except ImportError:
    pass
with open(sys.argv[1], "w") as file:
    json.dump([seconds, peak], file)
sys.exit(code if code >= 0 else 128 - code)
"""
