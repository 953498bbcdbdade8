"""DDPM with learned variance against float64 oracles and what theory says."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from fastgen.training.ddpm import GaussianDiffusion

BETAS = torch.linspace(1e-4, 0.02, 1000)


def batch(n: int, step: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start, noise = (torch.randn(n, 4, 3, 5, generator=generator) for _ in range(2))
    return start.clamp(-1, 1), noise, torch.full((n,), step)


@pytest.mark.parametrize("step", [0, 1, 500, 999])
def test_corruption_is_that_of_the_stock_scheduler(step: int) -> None:
    start, noise, steps = batch(2, step)
    stock = DDPMScheduler(beta_start=1e-4, beta_end=0.02).add_noise(start, noise, steps)
    torch.testing.assert_close(GaussianDiffusion(BETAS).corrupt(start, noise, steps), stock)


@settings(max_examples=20, deadline=None)
@given(step=st.integers(1, 999), seed=st.integers(0, 1000))
def test_bound_is_the_divergence_of_two_normals(step: int, seed: int) -> None:
    """Posterior from Bayes' rule in float64, model mean from the DDPM paper's formula, KL from torch.distributions."""
    start, noise, steps = batch(2, step, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    predicted, place = torch.randn(start.shape, generator=generator), torch.rand(start.shape, generator=generator)
    betas = BETAS.double()
    alpha, kept = 1 - betas, (1 - betas).cumprod(0)
    noisy = kept[step].sqrt() * start.double() + (1 - kept[step]).sqrt() * noise.double()
    # q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add up.
    precision = alpha[step] / betas[step] + 1 / (1 - kept[step - 1])
    mean = (
        alpha[step].sqrt() / betas[step] * noisy + kept[step - 1].sqrt() / (1 - kept[step - 1]) * start
    ) / precision
    truth = Normal(mean, precision.rsqrt())
    model_mean = (noisy - betas[step] / (1 - kept[step]).sqrt() * predicted) / alpha[step].sqrt()
    share = (place.double() + 1) / 2
    log_variance = share * betas[step].log() - (1 - share) * precision.log()
    expected = kl_divergence(truth, Normal(model_mean, (0.5 * log_variance).exp())).flatten(1).mean(1) / math.log(2)
    found = GaussianDiffusion(BETAS).bound(predicted, place, start, noise, steps)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-5)


def test_first_step_is_a_likelihood_of_levels() -> None:
    """At t = 0 the probabilities of all 256 levels of a value add up to one."""
    diffusion = GaussianDiffusion(BETAS)
    levels = torch.linspace(-1, 1, 256).reshape(256, 1, 1, 1)
    step, noise = torch.zeros(256, dtype=torch.long), torch.zeros(256, 1, 1, 1)
    # One mean for all: the noise that the model must predict for it differs from level to level.
    target = torch.full_like(levels, 0.1)
    predicted = (diffusion.corrupt(levels, noise, step) - diffusion.signal[0] * target) / diffusion.noise[0]
    bits = diffusion.bound(predicted, torch.zeros_like(levels), levels, noise, step)
    assert abs(float((-bits.double() * math.log(2)).exp().sum()) - 1) < 1e-3


def test_right_noise_and_the_right_variance_cost_nothing() -> None:
    """With the true noise the means agree, and the bound's only minimum over the variance is the posterior's."""
    diffusion = GaussianDiffusion(BETAS)
    start, noise, steps = batch(2, 2)  # late steps have hardly any room between the bounds
    bits = [float(diffusion.bound(noise, torch.full_like(noise, v), start, noise, steps).mean()) for v in (-1, 0, 1)]
    assert abs(bits[0]) < 1e-5 < bits[1] < bits[2]
    output = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)
    assert float(diffusion.loss(output, start, noise, steps).abs().max()) < 1e-5


def test_the_bound_trains_the_variance_alone() -> None:
    diffusion = GaussianDiffusion(BETAS)
    start, noise, steps = batch(2, 300)
    output = torch.zeros(2, 8, 3, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(diffusion.loss(output, start, noise, steps).sum(), output)
    (plain,) = torch.autograd.grad((output[:, :4] - noise).square().flatten(1).mean(1).sum(), output)
    torch.testing.assert_close(gradient[:, :4], plain[:, :4])
    assert bool((gradient[:, 4:] != 0).all())


@pytest.mark.parametrize("betas", [torch.zeros(5), torch.ones(5), torch.tensor([0.1]), torch.full((2, 2), 0.1)])
def test_bad_schedules(betas: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="betas"):
        GaussianDiffusion(betas)


def test_output_without_variance_is_refused() -> None:
    start, noise, steps = batch(1, 3)
    with pytest.raises(ValueError, match="8 channels"):
        GaussianDiffusion(BETAS).loss(start, start, noise, steps)
