"""Muon: orthogonality, scale, and that it trains."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.training.muon import Muon, orthogonalize


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), scale=st.sampled_from([1e-4, 1.0, 1e4]), seed=st.integers()
)
def test_singular_values_come_near_one_and_vectors_stay(rows: int, columns: int, scale: float, seed: int) -> None:
    """The result has the singular vectors of the input (float64 SVD oracle) and singular values near one."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    left, _ = torch.linalg.qr(torch.randn(rows, min(rows, columns), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, min(rows, columns), generator=generator, dtype=torch.float64))
    values = torch.linspace(0.3, 1.0, min(rows, columns), dtype=torch.float64) * scale
    result = orthogonalize((left * values) @ right.T)
    inner = left.T @ result @ right
    diagonal = inner.diagonal()
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    torch.testing.assert_close(inner, torch.diag(diagonal), rtol=0, atol=1e-6)


def test_step_has_the_rms_of_an_adamw_step() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(96, 256))
    weight.grad = torch.randn(96, 256)
    Muon([weight], lr=0.01).step()
    assert 0.14 < float(weight.detach().square().mean().sqrt()) / 0.01 < 0.26


def test_bfloat16_orthogonalises_to_its_own_precision() -> None:
    """The update keeps the weights' dtype and differs from the float32 one by bfloat16 rounding, not by more."""
    torch.manual_seed(0)
    gradient, steps = torch.randn(48, 96), []
    for bfloat16 in (False, True):
        weight = torch.nn.Parameter(torch.zeros(48, 96))
        weight.grad = gradient.clone()
        Muon([weight], lr=1.0, bfloat16=bfloat16).step()
        assert weight.dtype == torch.float32
        steps.append(weight.detach())
    error = float((steps[1] - steps[0]).norm() / steps[0].norm())
    assert 1e-4 < error < 0.1  # not the same arithmetic, and close to it


def test_it_solves_a_regression() -> None:
    torch.manual_seed(0)
    target, weight = torch.randn(16, 8), torch.nn.Parameter(torch.zeros(16, 8))
    x = torch.randn(64, 8)
    optimizer = Muon([weight], lr=0.3)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 200)
        optimizer.zero_grad()
        loss = (x @ (weight - target).T).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-3 * float((x @ target.T).square().mean())


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="2-D"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="lr > 0"):
        Muon([torch.nn.Parameter(torch.zeros(3, 3))], lr=0)
