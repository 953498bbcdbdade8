"""What the metrics cost besides the network: their memory at real size, and the share of their sums."""

from __future__ import annotations

import statistics
import sys
import time

import pytest
import torch

from fastgen.evaluation.benchmarks.measure import measure_process
from fastgen.evaluation.fid.extractors import Inception
from fastgen.evaluation.fid.frechet import bootstrap_frechet, frechet_distance
from fastgen.evaluation.fid.inception import POOL, InceptionV3
from fastgen.evaluation.fid.inception_score import inception_score
from fastgen.evaluation.fid.manifold import precision_recall
from fastgen.evaluation.fid.mmd import kid
from fastgen.evaluation.fid.protocols import PROTOCOLS
from fastgen.evaluation.fid.statistics import Moments


@pytest.mark.slow
def test_statistics_cost_little_compared_with_the_network() -> None:
    """The sums of a batch take 0.2 % of the network's arithmetic; a loaded machine shows up to a few percent."""
    torch.manual_seed(0)
    network = Inception(PROTOCOLS["adm"], InceptionV3())
    moments = {tap: Moments(width) for tap, width in network.taps.items()}
    batch = torch.rand(4, 3, 299, 299) * 255
    shares = []
    for _ in range(3):
        start = time.perf_counter()
        found = network(batch)
        middle = time.perf_counter()
        for tap, values in found.items():
            moments[tap].update(values)
        shares.append((middle - start) / (time.perf_counter() - start))
    assert statistics.median(shares) >= 0.95


def compute_metrics(features: int, reference: int, manifold: int | None = None, dims: int = POOL) -> dict[str, float]:
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
    precision, recall = precision_recall(x[:manifold], y[:manifold])
    distance, _ = kid(x, y, subsets=4, subset_size=min(1000, features, reference))
    found = {"fid": value, "stderr": interval.stderr, "is": score, "kid": distance}
    return {**found, "precision": precision, "recall": recall}


def test_metrics_of_random_features() -> None:
    found = compute_metrics(400, 300, dims=1008)
    assert found["fid"] > 0 and found["stderr"] > 0 and found["is"] == pytest.approx(1.04, abs=0.05)
    assert abs(found["kid"]) < 0.1 and 0.2 < found["precision"] <= 1 and 0.2 < found["recall"] <= 1


@pytest.mark.slow
def test_fifty_thousand_features_fit_into_a_gigabyte_and_a_half() -> None:
    command = f"""
import resource, runpy
metrics = runpy.run_path({__file__!r})["compute_metrics"]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
metrics(50_000, 10_000, 5_000)
"""
    _, peak, printed = measure_process([sys.executable, "-c", command])
    start = int(printed.split()[-1]) * (1 if sys.platform == "darwin" else 1024)
    assert peak is not None and peak - start < 1e9
    if torch.version.cuda is None:  # importing a torch with CUDA takes half a gigabyte more
        assert peak < 1.5e9
