"""Measuring: percentiles and whole processes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastgen.errors import FastgenError


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile, with linear interpolation between the sorted values."""
    ordered = sorted(values)
    result = {}
    for name, share in (("p20", 0.2), ("p50", 0.5), ("p80", 0.8)):
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        result[name] = ordered[low] + (ordered[high] - ordered[low]) * (place - low)
    return result


def measure_process(command: Sequence[str]) -> tuple[float, int | None, str]:
    """Run a command to its end.

    Returns:
        wall seconds, peak resident bytes (None where the system does not tell), standard output.

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
