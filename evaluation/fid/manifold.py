"""Precision and recall by nearest neighbours, never holding a whole distance matrix (arXiv:1904.06991)."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3
_ROWS, _COLUMNS = 1024, 4096


def precision_recall(
    features: Tensor, reference: Tensor, *, k: int = NEIGHBOURS, rows: int = _ROWS, columns: int = _COLUMNS
) -> tuple[float, float]:
    """Share of images inside the manifold of the reference, and of the reference inside that of the images.

    A manifold is the union of balls around its points that reach to their k-th neighbour (a point is not its own
    neighbour); a point at exactly that distance is inside, as in the ADM evaluator. That one rounds distances to half
    precision where they fit; here they are single, which moves a value by less than its sampling error.

    Args:
        features, reference: [n, d] and [m, d].
        k: neighbours.
        rows, columns: block of the distance matrix in memory at a time; the values do not depend on it.

    Raises:
        ValueError: a set has no k-th neighbour.
    """
    for name, x in (("images", features), ("reference", reference)):
        if len(x) <= k:
            raise ValueError(f"precision and recall: {len(x)} {name} are too few for {k} neighbours")
    a, b = features, reference.to(features.device)
    radii_a, radii_b = _radii(a, k, rows, columns), _radii(b, k, rows, columns)
    inside_a = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    inside_b = torch.zeros(len(b), dtype=torch.bool, device=a.device)
    for start in range(0, len(a), rows):
        for first in range(0, len(b), columns):
            ours, theirs = slice(start, start + rows), slice(first, first + columns)
            distance = _square_distances(a[ours], b[theirs])
            inside_a[ours] |= (distance <= radii_b[theirs]).any(1)
            inside_b[theirs] |= (distance <= radii_a[ours, None]).any(0)
    return float(inside_a.double().mean()), float(inside_b.double().mean())


def _radii(x: Tensor, k: int, rows: int, columns: int) -> Tensor:
    """Squared distance of each point to its k-th neighbour, [n]."""
    found = []
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        nearest = torch.empty(len(part), 0, dtype=x.dtype, device=x.device)
        for first in range(0, len(x), columns):
            distance = _square_distances(part, x[first : first + columns])
            nearest = torch.cat([nearest, distance], 1)
            # The point itself, at distance 0, is one of the k + 1.
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), largest=False, sorted=True).values
        found.append(nearest[:, k])
    return torch.cat(found)


def _square_distances(a: Tensor, b: Tensor) -> Tensor:
    # Distances do not change when both sets move, and near the origin their squares cancel less.
    center = b.mean(0)
    a, b = a - center, b - center
    return ((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T).clamp_(min=0)
