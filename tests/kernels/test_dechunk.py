"""De-chunking against a brute-force float64 reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.kernels.dechunk import dechunk, nearest_kept


def brute_force(
    h: np.ndarray, p: np.ndarray, mask: np.ndarray, grid: tuple[int, int], sigma: float | None
) -> np.ndarray:
    """One sample, float64, straight from the formulas: h [M, D], p and mask [L]."""
    where = np.flatnonzero(mask)
    u = np.stack([where // grid[1], where % grid[1]], axis=1).astype(np.float64)
    out = np.empty_like(h, dtype=np.float64)
    for i in range(len(where)):
        if sigma is None:
            out[i] = h[i]
            continue
        weights = np.exp(-((u[i] - u) ** 2).sum(axis=1) / (2 * sigma**2)) * np.maximum(p[where], 1e-12)
        out[i] = p[where[i]] * h[i] + (1 - p[where[i]]) * (weights[:, None] * h).sum(axis=0) / weights.sum()
    result = np.empty((len(mask), h.shape[1]))
    for index in range(len(mask)):
        row, column = divmod(index, grid[1])
        distance = (u[:, 0] - row) ** 2 + (u[:, 1] - column) ** 2
        result[index] = out[int(np.argmin(distance))]  # argmin takes the first of equals: the lowest index
    return result


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    samples=st.integers(1, 3),
    share=st.floats(0.01, 1.0),
    sigma=st.sampled_from([None, 0.5, 1.0, 2.0]),
    seed=st.integers(0, 10**6),
)
def test_equals_brute_force(
    height: int, width: int, samples: int, share: float, sigma: float | None, seed: int
) -> None:
    _check(height, width, samples, share, sigma, seed)


@pytest.mark.parametrize(("height", "width", "share"), [(64, 64, 0.25), (64, 64, 0.002), (1, 64, 0.1), (64, 1, 0.1)])
def test_equals_brute_force_on_large_grids(height: int, width: int, share: float) -> None:
    _check(height, width, 1, share, 1.0, 0)


def _check(height: int, width: int, samples: int, share: float, sigma: float | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    length = height * width
    mask = rng.random((samples, length)) < share
    mask[np.arange(samples), rng.integers(length, size=samples)] = True
    p = rng.random((samples, length)).astype(np.float32)
    tokens = rng.standard_normal((int(mask.sum()), 5)).astype(np.float32)
    result = dechunk(
        torch.from_numpy(tokens),
        torch.from_numpy(np.flatnonzero(mask)),
        torch.from_numpy(p),
        torch.from_numpy(mask),
        (height, width),
        sigma,
    )
    start = 0
    for i in range(samples):
        stop = start + int(mask[i].sum())
        expected = brute_force(
            tokens[start:stop].astype(np.float64), p[i].astype(np.float64), mask[i], (height, width), sigma
        )
        np.testing.assert_allclose(result[i].numpy(), expected, rtol=0, atol=2e-5)
        start = stop


def test_ties_go_to_the_lowest_index() -> None:
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 0, 2] = mask[0, 2, 0] = mask[0, 2, 2] = True
    assert nearest_kept(mask)[0].tolist() == [[0, 0, 2], [0, 0, 2], [6, 6, 8]]


def test_all_kept_and_sure_is_the_identity() -> None:
    tokens = torch.randn(2 * 15, 4)
    mask = torch.ones(2, 15, dtype=torch.bool)
    result = dechunk(tokens, torch.arange(30), torch.ones(2, 15), mask, (3, 5))
    assert torch.equal(result, tokens.view(2, 15, 4))


def test_probabilities_of_zero_stay_finite() -> None:
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    result = dechunk(torch.ones(1, 2), torch.tensor([5]), torch.zeros(1, 16), mask, (4, 4))
    assert torch.equal(result, torch.ones(1, 16, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_keeps_its_type(dtype: torch.dtype) -> None:
    tokens = (1000 * torch.randn(64, 3)).to(dtype)
    result = dechunk(tokens, torch.arange(64), torch.rand(1, 64), torch.ones(1, 64, dtype=torch.bool), (8, 8))
    assert result.dtype == dtype and bool(torch.isfinite(result).all())


def test_gradients_reach_tokens_and_probabilities() -> None:
    torch.manual_seed(0)
    mask = torch.rand(2, 12) < 0.5
    mask[:, 3] = True
    positions = mask.flatten().nonzero().squeeze(1)
    tokens = torch.randn(len(positions), 3, dtype=torch.float32, requires_grad=True)
    p = torch.rand(2, 12, requires_grad=True)
    result = dechunk(tokens, positions, p, mask, (3, 4))
    result.square().sum().backward()
    assert tokens.grad is not None and p.grad is not None
    kept = p.grad[mask]
    assert bool((kept != 0).all()) and bool((p.grad[~mask] == 0).all())
    # Against finite differences along one direction.
    direction = torch.randn_like(p) * mask
    step = 1e-3

    def value(q: torch.Tensor) -> float:
        return float(dechunk(tokens.detach(), positions, q, mask, (3, 4)).double().square().sum())

    slope = (value(p.detach() + step * direction) - value(p.detach() - step * direction)) / (2 * step)
    assert math.isclose(slope, float((p.grad * direction).sum()), rel_tol=2e-2, abs_tol=1e-2)


@pytest.mark.parametrize(
    ("grid", "sigma", "message"), [((3, 4), 1.0, "do not fit"), ((2, 5), 0.0, "sigma"), ((2, 5), -1.0, "sigma")]
)
def test_bad_input(grid: tuple[int, int], sigma: float, message: str) -> None:
    mask = torch.ones(1, 10, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        dechunk(torch.ones(10, 2), torch.arange(10), torch.ones(1, 10), mask, grid, sigma)
