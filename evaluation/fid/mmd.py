"""Kernel distances of two feature sets: KID and CMMD."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CMMD_SCALE", "CMMD_SIGMA", "cmmd", "kid"]

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
_ROWS = 4096


def kid(
    features: Tensor, reference: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance: unbiased MMD^2 of the kernel (x.y / d + 1)^3, over random subsets (arXiv:1801.01401).

    Args:
        features, reference: [n, d] and [m, d].
        subsets, subset_size: how many subsets of how many features of each side.
        seed: of the subsets; equal seeds give equal values.

    Returns:
        mean and standard deviation over the subsets; a mean near zero may be negative.

    Raises:
        ValueError: a set is smaller than a subset.
    """
    if subset_size < 2 or subsets < 1:
        raise ValueError(f"kid: needs subsets >= 1 of size >= 2, got {subsets} of {subset_size}")
    for name, x in (("features", features), ("reference", reference)):
        if len(x) < subset_size:
            raise ValueError(f"kid: {name} has {len(x)} images, a subset needs {subset_size}")
    from torchmetrics.image.kid import poly_mmd  # here, since it brings transformers along

    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        ours = torch.randperm(len(features), generator=generator)[:subset_size].to(features.device)
        theirs = torch.randperm(len(reference), generator=generator)[:subset_size].to(reference.device)
        # In double precision: the distance is a small difference of sums of large cubes.
        x, y = features[ours].double(), reference[theirs].double().to(features.device)
        values.append(float(poly_mmd(x, y, degree=3, gamma=None, coef=1.0)))
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std(correction=0))


def cmmd(features: Tensor, reference: Tensor, *, sigma: float = CMMD_SIGMA, rows: int = _ROWS) -> float:
    """CLIP maximum mean discrepancy: biased MMD^2 of a Gaussian kernel, times 1000 (arXiv:2401.09603).

    Args:
        features, reference: embeddings of length 1, [n, d] and [m, d].
        sigma: width of the kernel.
        rows: rows of the kernel matrix in memory at a time; the value does not depend on it beyond rounding.
    """
    if len(features) == 0 or len(reference) == 0:
        raise ValueError(f"cmmd: needs embeddings on both sides, got {len(features)} and {len(reference)}")
    gamma = 1 / (2 * sigma**2)

    def mean_kernel(a: Tensor, b: Tensor) -> float:
        total = 0.0
        squares = (b.double() ** 2).sum(1)
        for start in range(0, len(a), rows):
            x = a[start : start + rows].double()
            for first in range(0, len(b), rows):
                y = b[first : first + rows].double().to(x.device)
                square = (x**2).sum(1)[:, None] + squares[first : first + rows].to(x.device) - 2 * x @ y.T
                total += float(torch.exp(-gamma * square.clamp(min=0)).sum())
        return total / (len(a) * len(b))

    within = mean_kernel(features, features) + mean_kernel(reference, reference)
    return CMMD_SCALE * (within - 2 * mean_kernel(features, reference))
