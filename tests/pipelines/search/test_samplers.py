"""Schedule mathematics in float64 against analytic Gaussians and against the formulas of the papers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from long_tail import long_tail
from torch import Tensor

from fastgen.pipelines.search.interpolants import Interpolant, Level, Linear, Prediction, Tabulated, VariancePreserving
from fastgen.pipelines.search.samplers import DIFFUSIONS, Ancestral, EulerMaruyama, Sampler, rollover_times

TIMES = st.floats(0.02, 0.98)
INTERPOLANTS = st.sampled_from([Linear(), VariancePreserving()])
MEAN, DEVIATION = torch.tensor(0.5, dtype=torch.float64), 0.7


def gaussian(latents: Tensor, level: Level) -> Prediction:
    """What the perfect model says of data N(MEAN, DEVIATION^2)."""
    variance = (level.alpha * DEVIATION) ** 2 + level.sigma**2
    rest = latents - level.alpha * MEAN
    clean = MEAN + level.alpha * DEVIATION**2 / variance * rest
    return Prediction(clean, level.sigma / variance * rest)


def mixture(latents: Tensor, level: Level) -> Prediction:
    """The same for two narrow Gaussians at -1 (a third of the mass) and 1."""
    centres, masses, width = torch.tensor([-1.0, 1.0]).double(), torch.tensor([1 / 3, 2 / 3]).double(), 0.2
    variance = (level.alpha * width) ** 2 + level.sigma**2
    rest = latents[..., None] - level.alpha * centres
    share = (masses.log() - rest**2 / (2 * variance)).softmax(dim=-1)
    clean = (share * (centres + level.alpha * width**2 / variance * rest)).sum(dim=-1)
    return Prediction(clean, (share * level.sigma / variance * rest).sum(dim=-1))


def draw(sampler: Sampler, model: object, count: int, seed: int, stochastic: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, generator=generator, dtype=torch.float64)
    for index in range(sampler.transitions):
        noise = torch.randn(count, generator=generator, dtype=torch.float64) if stochastic else None
        latents = sampler.step(latents, model(latents, sampler.levels[index]), index, noise)  # type: ignore[operator]
    return model(latents, sampler.levels[-1]).clean  # type: ignore[operator, no-any-return]


@given(interpolant=INTERPOLANTS, t=TIMES, seed=st.integers(0, 99))
def test_velocity_noise_and_v_say_the_same(interpolant: Interpolant, t: float, seed: int) -> None:
    level = interpolant.level(t)
    clean, noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    truth = Prediction(clean, noise)
    latents = truth.at(level)
    for other in (
        Prediction.of_velocity(latents, truth.velocity(level), level.alpha, level.sigma, level.d_alpha, level.d_sigma),
        Prediction.of_noise(latents, noise, level.alpha, level.sigma),
        Prediction.of_clean(latents, clean, level.alpha, level.sigma),
    ):
        assert torch.allclose(other.clean, clean, atol=1e-9) and torch.allclose(other.noise, noise, atol=1e-9)
    if isinstance(interpolant, VariancePreserving):
        v = level.alpha * noise - level.sigma * clean
        assert torch.allclose(Prediction.of_v(latents, v, level.alpha, level.sigma).clean, clean, atol=1e-9)


@given(interpolant=INTERPOLANTS, t=TIMES)
def test_derivatives(interpolant: Interpolant, t: float) -> None:
    h = 1e-6
    before, here, after = (interpolant.level(t + shift) for shift in (-h, 0.0, h))
    assert here.d_alpha == pytest.approx((after.alpha - before.alpha) / (2 * h), rel=1e-4, abs=1e-6)
    assert here.d_sigma == pytest.approx((after.sigma - before.sigma) / (2 * h), rel=1e-4, abs=1e-6)


@given(interpolant=INTERPOLANTS, t=TIMES, x=st.floats(-3, 3))
def test_score_and_clean_sample_of_a_gaussian(interpolant: Interpolant, t: float, x: float) -> None:
    """Score, Tweedie's estimate and velocity equal the analytic ones, by the paper's formulas, to 1e-12."""
    level = interpolant.level(t)
    latents = torch.tensor(x, dtype=torch.float64)
    exact = gaussian(latents, level)
    variance = (level.alpha * DEVIATION) ** 2 + level.sigma**2
    u = exact.velocity(level)
    q = level.alpha / level.d_alpha
    score = (q * u - latents) / (level.sigma**2 - q * level.d_sigma * level.sigma)
    assert float(score) == pytest.approx(float(-(latents - level.alpha * MEAN) / variance), abs=1e-9)
    assert float(exact.score(level)) == pytest.approx(float(score), abs=1e-9)
    found = Prediction.of_velocity(latents, u, level.alpha, level.sigma, level.d_alpha, level.d_sigma)
    assert float(found.clean) == pytest.approx(float(exact.clean), abs=1e-9)
    if isinstance(interpolant, Linear):
        assert float(score) == pytest.approx(float(-(latents + (1 - t) * u) / t), abs=1e-9)
        assert float(found.clean) == pytest.approx(float(latents - t * u), abs=1e-12)


@given(r=st.floats(0.05, 1.0), x=st.floats(-3, 3))
def test_another_interpolant_is_a_change_of_scale(r: float, x: float) -> None:
    """The velocity that we have from the two predictions is that of the paper's conversion formula."""
    path, model = VariancePreserving(), Linear()
    sampler = Sampler(path, [r])
    t, c = sampler.model_level(0, model)
    a, b = path.level(r), model.level(t)
    assert t == pytest.approx(1 / (1 + a.alpha / a.sigma)) and a.alpha == pytest.approx(c * b.alpha)
    latents = torch.tensor(x, dtype=torch.float64)
    said = gaussian(latents / c, b)
    dt = b.sigma**2 * (a.sigma * a.d_alpha - a.alpha * a.d_sigma)
    dt /= a.sigma**2 * (b.sigma * b.d_alpha - b.alpha * b.d_sigma)
    dc = (b.sigma * a.d_sigma - a.sigma * b.d_sigma * dt) / b.sigma**2
    converted = dc * latents / c + dt * c * said.velocity(b)
    # said.clean and said.noise are those of the path as well: x = c (alpha x0 + sigma eps).
    rescaled = Prediction(said.clean, said.noise)
    assert float(rescaled.velocity(a)) == pytest.approx(float(converted), rel=1e-9, abs=1e-9)
    assert float(rescaled.at(a)) == pytest.approx(x, abs=1e-9)
    assert float(gaussian(latents, a).clean) == pytest.approx(float(said.clean), abs=1e-9)


def test_the_grid_of_the_paper() -> None:
    r = [1, 0.9950, 0.9798, 0.9539, 0.9165, 0.8660, 0.8, 0.7141, 0.6, 0.4359]
    t = [0.9935, 0.9931, 0.9920, 0.9898, 0.9856, 0.9776, 0.9617, 0.9289, 0.8591, 0.7087]
    sampler = EulerMaruyama.rollover(10)
    assert sampler.times == pytest.approx(r, abs=5e-5)
    assert [sampler.model_level(i, Linear())[0] for i in range(10)] == pytest.approx(t, abs=5e-5)


@pytest.mark.parametrize("diffusion", long_tail([*DIFFUSIONS, None], fast=("grpo", None)))
def test_moments_of_a_gaussian(diffusion: str | None) -> None:
    """At 1,000 steps any noise gives the data's moments within 1 % and four standard errors."""
    grid = [1 - i / 1000 for i in range(1000)]
    path: Interpolant = Linear()
    sampler: Sampler = Ancestral(path, grid, eta=0.6)
    if diffusion is not None:
        norm = 0.7 if diffusion == "grpo" else 1.0
        sampler = EulerMaruyama(path, [max(t, 1e-3) for t in grid], diffusion=diffusion, norm=norm)
    count = 20_000
    sample = draw(sampler, gaussian, count, seed=3)
    slack = 4 / math.sqrt(count)
    assert abs(float(sample.mean()) - 0.5) < 0.01 + slack * DEVIATION
    assert float(sample.std()) == pytest.approx(DEVIATION, rel=0.01 + slack)


@pytest.mark.parametrize(
    "sampler", long_tail(["ancestral", "euler-maruyama", "variance-preserving"], fast=("ancestral",))
)
def test_a_mixture_keeps_its_masses(sampler: str) -> None:
    grid = [1 - i / 400 for i in range(400)]
    chosen: Sampler = {
        "ancestral": Ancestral(Linear(), grid),
        "euler-maruyama": EulerMaruyama(Linear(), grid, norm=1.0),
        "variance-preserving": EulerMaruyama(VariancePreserving(), grid, norm=1.0),
    }[sampler]
    sample = draw(chosen, mixture, 20_000, seed=1)
    share = float((sample < 0).double().mean())
    assert abs(share - 1 / 3) < 0.02  # six standard errors
    assert float(sample[sample > 0].mean()) == pytest.approx(1.0, abs=0.02)


@given(interpolant=INTERPOLANTS, first=st.floats(0.5, 0.99), second=st.floats(0.05, 0.45), x=st.floats(-3, 3))
def test_no_noise_is_the_ode(interpolant: Interpolant, first: float, second: float, x: float) -> None:
    times = [first, second]
    latents, noise = torch.tensor([x], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    said = gaussian(latents, interpolant.level(first))
    plain = Sampler(interpolant, times).step(latents, said, 0, None)
    for sampler in (Ancestral(interpolant, times, eta=0.0), EulerMaruyama(interpolant, times, norm=0.0)):
        assert torch.equal(sampler.step(latents, said, 0, None), plain)
    assert torch.allclose(Ancestral(interpolant, times, eta=0.0).step(latents, said, 0, noise), plain, atol=1e-12)
    euler = latents - said.velocity(interpolant.level(first)) * (first - second)
    assert torch.allclose(EulerMaruyama(interpolant, times, norm=0.0).step(latents, said, 0, noise), euler, atol=1e-12)
    if isinstance(interpolant, Linear):
        assert torch.allclose(plain, euler, atol=1e-12)


@given(eta=st.floats(0, 1), first=st.floats(0.5, 0.99), second=st.floats(0.05, 0.45))
def test_ancestral_noise_has_the_variance_of_ddim(eta: float, first: float, second: float) -> None:
    """The total is the next level's variance; eta = 1 is the posterior's of DDPM."""
    path = VariancePreserving()
    sampler = Ancestral(path, [first, second], eta=eta)
    a, b = path.level(first), path.level(second)
    beta = 1 - (a.alpha / b.alpha) ** 2  # 1 - abar_t / abar_prev
    assert sampler.deviation(0) ** 2 == pytest.approx(eta**2 * b.sigma**2 / a.sigma**2 * beta, rel=1e-9, abs=1e-15)
    zero = torch.zeros(1, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    moved = sampler.step(zero, Prediction(zero, one), 0, zero)
    assert float(moved) ** 2 + sampler.deviation(0) ** 2 == pytest.approx(b.sigma**2)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="times"):
        Sampler(Linear(), [])
    with pytest.raises(ValueError, match="times"):
        Sampler(Linear(), [0.5, 0.5])
    with pytest.raises(ValueError, match="eta"):
        Ancestral(Linear(), [1.0, 0.5], eta=1.5)
    with pytest.raises(ValueError, match="diffusion"):
        EulerMaruyama(Linear(), [1.0, 0.5], diffusion="cubic")
    with pytest.raises(ValueError, match="norm"):
        EulerMaruyama(Linear(), [1.0, 0.5], norm=-1.0)
    with pytest.raises(ValueError, match="beta"):
        VariancePreserving(2.0, 1.0)
    with pytest.raises(ValueError, match="count"):
        rollover_times(0)
    table = Tabulated.of([999, 500], [0.1, 0.6], [0.99, 0.8])
    with pytest.raises(ValueError, match="no derivatives"):
        EulerMaruyama(table, [999.0, 500.0])
    with pytest.raises(ValueError, match="signal-to-noise"):
        Sampler(Linear(), [1.0, 0.5]).model_level(1, table)
