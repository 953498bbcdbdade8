"""How fast ShapesWorld draws: pictures a second with one process and with several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from fastgen.data.shapes import ShapesWorld
from fastgen.environment import environment
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.measure import percentiles

_BATCH = 256


def benchmark_data(images: int = 4096, runs: int = 5, processes: Sequence[int] = (1, 2)) -> dict[str, Any]:
    """Draw `images` pictures `runs` times with each number of processes.

    Returns:
        a JSON-ready dict: "environment", "settings" and "rows" with percentiles of pictures a second.

    Raises:
        FastgenError: a number below 1.
    """
    for name, value in (("images", images), ("runs", runs), ("processes", min(processes, default=0))):
        if value < 1:
            raise FastgenError(f"{name}: {value} is not allowed, needs an integer >= 1")
    rows = []
    for count in processes:
        with ProcessPoolExecutor(count) as pool:
            list(pool.map(_draw, range(count), [_BATCH] * count))  # starts the processes and their imports
            rates = []
            for run in range(runs):
                share = -(-images // count)
                start = time.perf_counter()
                drawn = sum(pool.map(_draw, range(run * count, (run + 1) * count), [share] * count))
                rates.append(drawn / (time.perf_counter() - start))
        rows.append({"processes": count, "n": runs, "images_per_second": percentiles(rates)})
    return {
        "benchmark": "data",
        "environment": environment(),
        "settings": {"images": images, "runs": runs, "processes": list(processes)},
        "rows": rows,
    }


def _draw(seed: int, images: int) -> int:
    """Draw `images` pictures of data set `seed` in batches; returns their number."""
    world, drawn = ShapesWorld(seed), 0
    while drawn < images:
        drawn += len(world.batch(min(_BATCH, images - drawn), drawn).images)
    return drawn
