"""Stochastic sampling of models that were trained to follow an ODE: the proposals of a search.

A sampler has N times and takes N - 1 transitions between them; at the last one the clean prediction is the picture.
All factors are Python floats (float64); latents keep their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.checks import check_integer, check_number
from fastgen.pipelines.search.interpolants import Interpolant, Level, Prediction, VariancePreserving

__all__ = ["DIFFUSIONS", "Ancestral", "EulerMaruyama", "Sampler", "rollover_times"]

#: Diffusion coefficients g(t, level) of unit size; every g keeps the marginal distributions in continuous time.
DIFFUSIONS: dict[str, Callable[[float, Level], float]] = {
    "sigma": lambda t, level: level.sigma,
    "constant": lambda t, level: 1.0,
    "sine": lambda t, level: math.sin(0.5 * math.pi * t),
    "linear": lambda t, level: t,
    "square": lambda t, level: t * t,
    # Flow-GRPO's sqrt(t / (1 - t)); it has a pole at pure noise.
    "grpo": lambda t, level: math.sqrt(t / max(1.0 - t, 1e-2)),
}


def rollover_times(count: int) -> list[float]:
    """The grid r = sqrt(1 - (1 - s)^2), s = 1, (N - 1) / N, …, 1 / N, of arXiv 2503.19385.

    Raises:
        ValueError: count < 1.
    """
    check_integer("count", count, 1)
    return [math.sqrt(1.0 - (1.0 - (count - i) / count) ** 2) for i in range(count)]


@dataclass(frozen=True)
class Sampler:
    """Deterministic: the ODE in steps of DDIM, which for the linear interpolant are Euler's.

    Attributes:
        interpolant: of the samples.
        times: N of them, falling.

    Raises:
        ValueError: no time, or times that do not fall.
    """

    interpolant: Interpolant
    times: Sequence[float]
    levels: list[Level] = field(init=False)

    def __post_init__(self) -> None:
        if not self.times or any(after >= before for before, after in zip(self.times, self.times[1:], strict=False)):
            raise ValueError(f"times: {list(self.times)} is not allowed, needs numbers that fall")
        object.__setattr__(self, "levels", [self.interpolant.level(t) for t in self.times])

    @property
    def transitions(self) -> int:
        """N - 1."""
        return len(self.times) - 1

    def step(self, latents: Tensor, prediction: Prediction, index: int, noise: Tensor | None) -> Tensor:
        """The sample at time `index + 1`.

        Args:
            latents: [k, …] at time `index`.
            prediction: of the model there.
            index: 0 … N - 2.
            noise: [k, …] standard normal; None takes the ODE's step.
        """
        after = self.levels[index + 1]
        return prediction.at(after) if noise is None else self._noisy(latents, prediction, index, noise)

    def _noisy(self, latents: Tensor, prediction: Prediction, index: int, noise: Tensor) -> Tensor:
        return prediction.at(self.levels[index + 1])

    def model_level(self, index: int, model: Interpolant) -> tuple[float, float]:
        """Where the model has the signal-to-noise ratio of time `index`, and the scale c: it reads latents / c.

        Raises:
            ValueError: a model with levels at given times only, asked for another interpolant.
        """
        if model is self.interpolant:
            return self.times[index], 1.0
        level = self.levels[index]
        t = model.time_of(level.alpha / level.sigma)
        return t, level.sigma / model.level(t).sigma


@dataclass(frozen=True)
class Ancestral(Sampler):
    """Stochastic DDIM (arXiv 2010.02502): the posterior given the clean prediction, its noise scaled by eta.

    The variance at the next level is right at any step length, for every interpolant (unlike Euler-Maruyama's).

    Attributes:
        eta: 0 (the ODE) to 1 (DDPM).

    Raises:
        ValueError: eta outside [0, 1].
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eta", self.eta, 0, 1)

    def deviation(self, index: int) -> float:
        """Standard deviation of the noise that the transition adds."""
        now, after = self.levels[index], self.levels[index + 1]
        kept = now.sigma**2 - (now.alpha / after.alpha * after.sigma) ** 2
        return self.eta * after.sigma / now.sigma * math.sqrt(max(kept, 0.0))

    def _noisy(self, latents: Tensor, prediction: Prediction, index: int, noise: Tensor) -> Tensor:
        after, deviation = self.levels[index + 1], self.deviation(index)
        rest = math.sqrt(max(after.sigma**2 - deviation**2, 0.0))
        return prediction.at(Level(after.alpha, rest)) + deviation * noise


@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """x - u d + g^2 score d / 2 + g sqrt(d) xi over a step of length d (arXiv 2503.19385, section 4.1).

    Attributes:
        diffusion: a name of `DIFFUSIONS`.
        norm: factor of it; g = 3 t^2 is the paper's.

    Raises:
        ValueError: unknown diffusion, a negative norm, or an interpolant without derivatives.
    """

    diffusion: str = "square"
    norm: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.diffusion not in DIFFUSIONS:
            raise ValueError(f"diffusion: {self.diffusion!r} is unknown, there are {', '.join(DIFFUSIONS)}")
        check_number("norm", self.norm, 0)
        if any(math.isnan(level.d_alpha) for level in self.levels):
            raise ValueError(f"interpolant: {self.interpolant.name} has no derivatives; take the ancestral sampler")

    def step(self, latents: Tensor, prediction: Prediction, index: int, noise: Tensor | None) -> Tensor:
        if noise is None:
            return super().step(latents, prediction, index, None)
        t, level = self.times[index], self.levels[index]
        length = t - self.times[index + 1]
        g = self.norm * DIFFUSIONS[self.diffusion](t, level)
        drift = -prediction.velocity(level) + 0.5 * g * g * prediction.score(level)
        return torch.add(latents + drift * length, noise, alpha=g * math.sqrt(length))

    @classmethod
    def rollover(cls, count: int) -> EulerMaruyama:
        """As arXiv 2503.19385 searches: variance-preserving, its own grid, g = 3 t^2."""
        return cls(VariancePreserving(), rollover_times(count))
