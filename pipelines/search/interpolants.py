"""Interpolants between data and noise, and what a model's prediction says along them.

x_t = alpha(t) x_0 + sigma(t) eps, t = 0 data. Whatever a model predicts (velocity, noise, v), it gives the clean
sample and the noise; everything else, the velocity of any interpolant and the score, follows from these two. That
makes the change to another interpolant of the same signal-to-noise ratios a change of scale ("Inference-time scaling
for flow models", arXiv 2503.19385, section 4): in x / c the model sees what it was trained on, and the two predictions
are the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Factor", "Interpolant", "Level", "Linear", "Prediction", "Tabulated", "VariancePreserving"]

#: A factor of the samples: the same for all, or [k, 1, …].
Factor = float | Tensor


@dataclass(frozen=True, slots=True)
class Level:
    """A point of an interpolant.

    Attributes:
        alpha, sigma: factors of the clean sample and of the noise.
        d_alpha, d_sigma: their derivatives by t; NaN where the interpolant has none (`Tabulated`).
    """

    alpha: float
    sigma: float
    d_alpha: float = math.nan
    d_sigma: float = math.nan


@dataclass(frozen=True, slots=True)
class Prediction:
    """A model's prediction for noisy samples.

    Attributes:
        clean: [k, …] the expected clean sample ("x0hat", Tweedie's estimate).
        noise: [k, …] the expected noise.
    """

    clean: Tensor
    noise: Tensor

    @classmethod
    def of_velocity(
        cls,
        latents: Tensor,
        velocity: Tensor,
        alpha: Factor,
        sigma: Factor,
        d_alpha: Factor = -1.0,
        d_sigma: Factor = 1.0,
    ) -> Prediction:
        """From u = alpha' x_0 + sigma' eps; the derivatives are those of the linear interpolant if not given."""
        det = d_alpha * sigma - d_sigma * alpha
        clean = (sigma * velocity - d_sigma * latents) / det
        return cls(clean, (d_alpha * latents - alpha * velocity) / det)

    @classmethod
    def of_noise(cls, latents: Tensor, noise: Tensor, alpha: Factor, sigma: Factor) -> Prediction:
        """From eps."""
        return cls((latents - sigma * noise) / alpha, noise)

    @classmethod
    def of_v(cls, latents: Tensor, v: Tensor, alpha: Factor, sigma: Factor) -> Prediction:
        """From v = alpha eps - sigma x_0 of a variance-preserving interpolant."""
        return cls(alpha * latents - sigma * v, sigma * latents + alpha * v)

    @classmethod
    def of_clean(cls, latents: Tensor, clean: Tensor, alpha: Factor, sigma: Factor) -> Prediction:
        """From x_0."""
        return cls(clean, (latents - alpha * clean) / sigma)

    def at(self, level: Level) -> Tensor:
        """The sample that this clean sample and this noise make at another level."""
        return level.alpha * self.clean + level.sigma * self.noise

    def velocity(self, level: Level) -> Tensor:
        """u = alpha' x_0 + sigma' eps."""
        return level.d_alpha * self.clean + level.d_sigma * self.noise

    def score(self, level: Level) -> Tensor:
        """Gradient of the logarithm of the density at that level: -eps / sigma."""
        return self.noise / -level.sigma


class Interpolant(ABC):
    """A family of noise levels; t falls from noise to data."""

    name: str

    @abstractmethod
    def level(self, t: float) -> Level:
        """The level at t."""

    def time_of(self, ratio: float) -> float:
        """The t at which alpha / sigma is `ratio`.

        Raises:
            ValueError: an interpolant that has levels at given times only.
        """
        raise ValueError(f"interpolant: {self.name} cannot be asked for any signal-to-noise ratio")


class Linear(Interpolant):
    """alpha = 1 - t, sigma = t: flow matching."""

    name = "linear"

    def level(self, t: float) -> Level:
        return Level(1.0 - t, t, -1.0, 1.0)

    def time_of(self, ratio: float) -> float:
        return 1.0 / (1.0 + ratio)


class VariancePreserving(Interpolant):
    """alpha = exp(-T / 2), sigma = sqrt(1 - exp(-T)), T = t^2 (beta_max - beta_min) / 2 + t beta_min, 0 < t <= 1."""

    name = "variance-preserving"

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min < beta_max:
            raise ValueError(
                f"beta_min, beta_max: {beta_min}, {beta_max} are not allowed, need 0 < beta_min < beta_max"
            )
        self.beta_min, self.beta_max = beta_min, beta_max

    def level(self, t: float) -> Level:
        integral = 0.5 * t * t * (self.beta_max - self.beta_min) + t * self.beta_min
        beta = t * (self.beta_max - self.beta_min) + self.beta_min
        alpha, sigma = math.exp(-0.5 * integral), math.sqrt(-math.expm1(-integral))
        return Level(alpha, sigma, -0.5 * beta * alpha, 0.5 * beta * math.exp(-integral) / sigma)


class Tabulated(Interpolant):
    """Levels at given times only, as models trained on 1,000 discrete timesteps have them.

    Args:
        levels: by time.
    """

    name = "tabulated"

    def __init__(self, levels: dict[float, Level]) -> None:
        self.levels = levels

    @classmethod
    def of(cls, times: Sequence[float], alphas: Sequence[float], sigmas: Sequence[float]) -> Tabulated:
        """From factors at times."""
        rows = zip(times, alphas, sigmas, strict=True)
        return cls({float(t): Level(float(alpha), float(sigma)) for t, alpha, sigma in rows})

    def level(self, t: float) -> Level:
        return self.levels[float(t)]
