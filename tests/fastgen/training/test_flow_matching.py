"""The weighted error of the velocity: same minimiser as the plain one, unit size, right variances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.training.flow_matching import TokenMetric, flow_matching_batch


def coloured(n: int, seed: int = 0) -> torch.Tensor:
    """Latents [n, 3, 4, 6] whose tokens are Gaussian with very unequal directions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(7)))[0]
    tokens = torch.randn(n, 6, 12, generator=generator) * torch.logspace(-1.5, 0.5, 12) @ mixing
    return tokens.reshape(n, 2, 3, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(n, 3, 4, 6)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.97])
def test_best_gaussian_velocity_costs_one(exponent: float, sigma: float) -> None:
    """The float64 posterior mean of Gaussian tokens has a weighted error of 1; of 40,000 tokens, within 2 %."""
    data, noise = coloured(6500), torch.randn(6500, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    metric = TokenMetric(coloured(6500, seed=2), exponent)
    tokens = [value.reshape(-1, 3, 2, 2, 3, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 12).double() for value in
              (data, (1 - sigma) * data + sigma * noise)]  # fmt: skip
    covariance = tokens[0].T.cov()
    gain = (
        (1 - sigma)
        * covariance
        @ torch.linalg.inv((1 - sigma) ** 2 * covariance + sigma**2 * torch.eye(12, dtype=torch.float64))
    )
    mean = tokens[0].mean(0)
    start = mean + (tokens[1] - (1 - sigma) * mean) @ gain.T
    # data - noise = (x_0 - x_t) / sigma for every x_0: the error of the velocity is that of x_0 over sigma.
    error = ((start - tokens[0]) / sigma).float().reshape(-1, 2, 3, 2, 2, 3).permute(0, 5, 1, 3, 2, 4)
    cost = metric(error.reshape(-1, 3, 4, 6), torch.full((6500,), sigma)).mean()
    assert abs(float(cost) - 1) < 0.02


@settings(max_examples=15, deadline=None)
@given(exponent=st.floats(0, 1), sigma=st.floats(0.01, 1.0), seed=st.integers(0, 1000))
def test_the_minimiser_is_the_mean(exponent: float, sigma: float, seed: int) -> None:
    """Of targets seen with equal chance, whatever the weighting."""
    metric = TokenMetric(coloured(64), exponent)
    targets = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(seed))
    level = torch.full((5,), sigma)
    output = targets.mean(0, keepdim=True).requires_grad_()
    (gradient,) = torch.autograd.grad(metric(output - targets, level).sum(), output)
    moved = (output + 0.1 * torch.randn_like(output)).detach()
    assert float(gradient.abs().max()) < 1e-3 * float(metric(moved - targets, level).sum())
    assert float(metric(output.detach() - targets, level).sum()) < float(metric(moved - targets, level).sum())


def test_exponent_zero_is_the_plain_error_up_to_scale() -> None:
    metric = TokenMetric(coloured(64), 0.0)
    errors = torch.randn(7, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    ratio = metric(errors, torch.full((7,), 0.4)) / errors.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(ratio, ratio[:1].expand(7))


def test_numbers_of_the_log() -> None:
    metric = TokenMetric(coloured(64))
    output, target = torch.zeros(3, 3, 4, 6), torch.ones(3, 3, 4, 6)
    loss, numbers = metric.loss(output, target, torch.tensor([0.1, 0.2, 0.9]))
    assert numbers["velocity"] == numbers["high_noise"] == 1.0 and numbers["weighted"] == float(loss)
    assert metric.loss(output, target, torch.full((3,), 0.1))[1]["high_noise"] != numbers["high_noise"]  # none: NaN


def test_noisy_latents_and_target_fit_together() -> None:
    latents = coloured(500)
    noisy, sigma, target = flow_matching_batch(latents, torch.Generator().manual_seed(0))
    level = sigma[:, None, None, None]
    torch.testing.assert_close(noisy + level * target, latents, rtol=1e-4, atol=1e-5)
    assert float(sigma.min()) > 0 and float(sigma.max()) <= 1
    assert float((sigma > 0.5).float().mean()) > 0.7  # leans to noise
