"""What the FID family costs beside its network: the share of the statistics, several processes, memory.

Speed and memory do not depend on the values of the weights, so the network has random ones.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgen.environment import environment
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.measure import measure_process, percentiles
from fastgen.evaluation.distributed import Group
from fastgen.evaluation.fid.extractors import Inception
from fastgen.evaluation.fid.features import extract
from fastgen.evaluation.fid.frechet import bootstrap_frechet, frechet_distance
from fastgen.evaluation.fid.inception import POOL, InceptionV3
from fastgen.evaluation.fid.inception_score import inception_score
from fastgen.evaluation.fid.manifold import precision_recall
from fastgen.evaluation.fid.mmd import kid
from fastgen.evaluation.fid.protocols import PROTOCOLS
from fastgen.evaluation.fid.readers import CallbackSource
from fastgen.evaluation.fid.statistics import Moments
from fastgen.evaluation.report import markdown_table, provenance

__all__ = ["benchmark_fid", "fid_markdown"]

_SIZE = 256  # pixels, that of ImageNet references


def benchmark_fid(
    images: int = 512,
    *,
    batch_size: int = 32,
    runs: int = 5,
    processes: Sequence[int] = (1, 2),
    features: int = 50_000,
    reference: int = 10_000,
    manifold: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure the three.

    Args:
        images: extracted with each number of processes, on one thread each on a CPU; work is shared in pieces of 256,
            so fewer than that for each process leave one without any.
        batch_size: images in one pass of the network.
        runs: measured batches of network and statistics.
        processes: numbers of processes; a GPU each on "cuda".
        features, reference: sizes of the sets whose metrics are computed for their memory; 0 features: not measured.
        manifold: features taken for precision and recall, whose arithmetic grows with the square; all when None.
        device: cpu or cuda.

    Returns:
        JSON-ready: environment, settings, statistics (seconds of a batch), processes (images a second), memory.

    Raises:
        FastgenError: a number below 1, or a process failed.
    """
    numbers = (
        ("images", images),
        ("batch_size", batch_size),
        ("runs", runs),
        ("processes", min(processes, default=0)),
    )
    for name, value in numbers:
        if value < 1:
            raise FastgenError(f"{name}: {value} is not allowed, needs an integer >= 1")
    return {
        "benchmark": "fid",
        "environment": environment(),
        "settings": {
            "images": images,
            "batch_size": batch_size,
            "runs": runs,
            "features": features,
            "reference": reference,
            "manifold": manifold,
            "device": device,
        },
        "statistics": _statistics(batch_size, runs, device),
        "processes": [_processes(count, images, batch_size, device) for count in processes],
        "memory": _memory(features, reference, manifold or features) if features else None,
    }


def _network(device: str) -> Inception:
    torch.manual_seed(0)
    return Inception(PROTOCOLS["adm"], InceptionV3(), device=device)


def _statistics(batch_size: int, runs: int, device: str) -> dict[str, Any]:
    """Seconds of a batch in the network and in the sums of both taps."""
    network = _network(device)
    moments = {tap: Moments(width, device) for tap, width in network.taps.items()}
    batch = torch.rand(batch_size, 3, 299, 299) * 255
    seconds: dict[str, list[float]] = {"network": [], "statistics": []}

    def clock() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    for run in range(runs + 1):
        start = clock()
        found = network(batch)
        middle = clock()
        for tap, values in found.items():
            moments[tap].update(values)
        end = clock()
        if run:  # the first one warms up
            seconds["network"].append(middle - start)
            seconds["statistics"].append(end - middle)
    share = float(np.median(seconds["network"]) / (np.median(seconds["network"]) + np.median(seconds["statistics"])))
    return {**{name: percentiles(values) for name, values in seconds.items()}, "network_share": share}


def _processes(count: int, images: int, batch_size: int, device: str) -> dict[str, Any]:
    """Images a second of `count` processes, from the moment when all have their network."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "seconds.json")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        work = ["-m", "fastgen.evaluation.benchmarks.fid", str(out), str(images), str(batch_size), device]
        measure_process([sys.executable, *launcher, *work])
        seconds = float(json.loads(out.read_text()))
    return {"processes": count, "seconds": seconds, "images_per_second": images / seconds}


def _extract(out: str, images: int, batch_size: int, device: str) -> None:
    """What each of the processes runs."""
    if not device.startswith("cuda"):
        torch.set_num_threads(1)  # a core each, or one process would have all of them
    group = Group.from_environment(device)
    with group.reporting():
        network = _network(group.device(device))
        picture = np.random.default_rng(0).integers(0, 256, (_SIZE, _SIZE, 3), dtype=np.uint8)
        source = CallbackSource(images, lambda index: np.roll(picture, index, 0), identity="noise")
        network(torch.zeros(1, 3, 299, 299))
        group.meet()
        start = time.perf_counter()
        extract(source, network, keep=["pool"], group=group, batch_size=batch_size)
        if group.is_main:
            Path(out).write_text(json.dumps(time.perf_counter() - start))


_METRICS = """
import resource, sys
from fastgen.evaluation.benchmarks.fid import compute_metrics
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
compute_metrics(*map(int, sys.argv[1:]))
print(before)
"""


def _memory(features: int, reference: int, manifold: int) -> dict[str, Any]:
    """Peak memory of a process that computes every metric of `features` features of Inception."""
    command = [sys.executable, "-c", _METRICS, str(features), str(reference), str(manifold)]
    seconds, peak, printed = measure_process(command)
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": seconds, "peak_bytes": peak, "start_bytes": int(printed.split()[-1]) * unit}


def compute_metrics(
    features: int, reference: int, manifold: int | None = None, *, dims: int = POOL, k: int = 3
) -> dict[str, float]:
    """FID with an interval, KID, IS and precision (of the first `manifold`) of random features, as the engine does."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.empty(features, dims), torch.empty(reference, dims)
    moments = [Moments(dims), Moments(dims)]
    for sums, whole in zip(moments, (x, y), strict=True):
        for part in whole.split(256):
            part.copy_(torch.rand(part.shape, generator=generator))
            sums.update(part)
    ours, theirs = (sums.gaussian() for sums in moments)
    value = frechet_distance(ours, theirs)
    interval = bootstrap_frechet(x, theirs, value, replicates=2)
    score, _ = inception_score(x, lambda part: part[:, :1008], split_size=5000)
    precision, recall = precision_recall(x[:manifold], y[:manifold], k=k)
    distance, _ = kid(x, y, subsets=4, subset_size=min(1000, features, reference))
    found = {"fid": value, "stderr": interval.stderr, "is": score, "kid": distance}
    return {**found, "precision": precision, "recall": recall}


def fid_markdown(data: dict[str, Any]) -> str:
    """A result of `fastgen bench fid`."""
    times = data["statistics"]
    first = data["processes"][0]["images_per_second"]
    rows = [
        [str(row["processes"]), f"{row['images_per_second']:.2f}", f"{row['images_per_second'] / first:.2f}"]
        for row in data["processes"]
    ]
    text = (
        f"A batch of {data['settings']['batch_size']} images: {1e3 * times['network']['p50']:.1f} ms in Inception, "
        f"{1e3 * times['statistics']['p50']:.2f} ms in the sums of both taps: the pass runs at "
        f"{100 * times['network_share']:.2f} % of the network's speed.\n\n"
        + markdown_table(["processes", "images/s", "speed-up"], rows)
    )
    if data["memory"] is not None:
        peak, start = (data["memory"][name] for name in ("peak_bytes", "start_bytes"))
        text += (
            f"\nMetrics of {data['settings']['features']} x {POOL} features against {data['settings']['reference']}: "
            f"{peak / 1e9:.2f} GB at the peak, of which {start / 1e9:.2f} GB before the first feature.\n"
        )
    if "note" in data:
        text += "\n" + data["note"] + "\n"
    return text + "\n" + provenance(data) + "\n"


if __name__ == "__main__":
    _extract(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
