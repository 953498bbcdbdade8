"""The Fréchet distance of two Gaussians, and how much it varies with the sample.

d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)    (Heusel et al. 2017, arXiv:1706.08500, eq. 6)

The matrix root is taken through eigenvalues of the symmetric sqrt(S1) S2 sqrt(S1), which has those of S1 S2: no
imaginary part to drop, no ridge to add to a singular product, and a fraction of the time of a general matrix root.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.evaluation.fid.statistics import Gaussian

_TOLERANCE = 1e-6  # how far below zero, relative to the largest, rounding may push an eigenvalue of a covariance
_ROWS = 2048  # features in one block of a bootstrap replicate
_DOUBLE_UP_TO = 512  # wider features are multiplied in single precision: an error bar needs no more


@dataclass(frozen=True, slots=True)
class Interval:
    """Sampling error of a value.

    Attributes:
        stderr: standard deviation of the replicates.
        low, high: 95 % confidence interval.
        replicates: how many there were.
    """

    stderr: float
    low: float
    high: float
    replicates: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready dict."""
        return {"stderr": self.stderr, "ci95": [self.low, self.high], "bootstrap": self.replicates}


def matrix_root(covariance: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix, float64 [d, d].

    Raises:
        ValueError: it has an eigenvalue below zero by more than rounding.
    """
    values, vectors = torch.linalg.eigh(covariance)
    if values[0] < -_TOLERANCE * max(float(values[-1].abs()), 1e-300):
        raise ValueError(f"statistics: the covariance has a negative eigenvalue ({float(values[0]):.3g})")
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance, >= 0.

    Raises:
        ValueError: the widths differ, or a matrix is no covariance.
    """
    if a.dims != b.dims:
        raise ValueError(f"statistics: of {a.dims} and of {b.dims} features do not compare")
    return _distance(a, b, matrix_root(b.covariance.to(a.mean.device)))


def _distance(a: Gaussian, b: Gaussian, root_b: Tensor) -> float:
    product = root_b @ a.covariance @ root_b
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    shift = ((a.mean - b.mean.to(a.mean.device)) ** 2).sum()
    value = shift + a.covariance.trace() + b.covariance.trace().to(a.mean.device) - 2 * cross
    return max(float(value), 0.0)  # rounding can leave a value a hair below zero for identical sets


def bootstrap_frechet(
    features: Tensor,
    reference: Gaussian,
    value: float,
    *,
    replicates: int = 100,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Interval:
    """How much the distance of `features` to a fixed reference varies with the sample of images.

    Images are drawn with replacement. The distance of a drawn set is biased upwards against that of the whole one (it
    has fewer different images), so the interval is the spread of the replicates around their own mean, laid around
    `value`.

    Args:
        features: [n, d], on the device to compute on.
        value: the distance of all features.
        replicates: >= 2.
        seed: of the draws.
        on_progress: called with (replicates done, all).

    Raises:
        ValueError: fewer than two replicates or features.
    """
    if replicates < 2:
        raise ValueError(f"replicates: needs an integer >= 2, got {replicates}")
    n, dims = features.shape
    if n < 2:
        raise ValueError(f"features: a bootstrap needs at least 2, got {n}")
    generator = torch.Generator().manual_seed(seed)
    root = matrix_root(reference.covariance.to(features.device))
    center = features.double().mean(0) if n * dims <= 1 << 22 else features.mean(0).double()
    values = []
    for done in range(1, replicates + 1):
        weights = torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).to(features.device)
        values.append(_distance(_weighted(features, weights, center), reference, root))
        if on_progress is not None:
            on_progress(done, replicates)
    found = torch.tensor(values, dtype=torch.float64)
    spread = found - found.mean()
    low, high = torch.quantile(spread, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(spread.std()), max(value + low, 0.0), value + high, replicates)


def _weighted(features: Tensor, weights: Tensor, center: Tensor) -> Gaussian:
    """Statistics of the features, each taken as often as its weight says; deviations from `center` keep precision."""
    n, dims = features.shape
    kind = torch.float64 if dims <= _DOUBLE_UP_TO else torch.float32
    total = torch.zeros(dims, dtype=torch.float64, device=features.device)
    outer = torch.zeros(dims, dims, dtype=torch.float64, device=features.device)
    for start in range(0, n, _ROWS):
        weight = weights[start : start + _ROWS]
        drawn = weight > 0  # more than a third are not
        weight = weight[drawn].to(kind)[:, None]
        x = features[start : start + _ROWS][drawn].to(kind) - center.to(kind)
        total += (x * weight).sum(0).double()
        outer += ((x * weight).T @ x).double()
    mean = total / n
    return Gaussian(center + mean, (outer - n * torch.outer(mean, mean)) / (n - 1), n)
