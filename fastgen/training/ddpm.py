"""DDPM with learned variance (Nichol & Dhariwal, arXiv 2102.09672), the training loss of DiT."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class GaussianDiffusion:
    """The forward process of a variance schedule, and the loss of a model that predicts noise and variance.

    Args:
        betas: [T], each in (0, 1); DiT's are linear from 1e-4 to 0.02.

    Raises:
        ValueError: betas out of range.
    """

    def __init__(self, betas: Tensor) -> None:
        betas = betas.double().cpu()
        if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas: need at least two numbers in (0, 1), got shape {tuple(betas.shape)}")
        kept = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        posterior = betas * (1 - before) / (1 - kept)
        self.steps = len(betas)
        self.signal, self.noise = kept.sqrt().float(), (1 - kept).sqrt().float()
        # q(x_{t-1} | x_t, x_0) has no variance at t = 0: the logarithm of t = 1 is used there.
        self.posterior_log_variance = torch.cat([posterior[1:2], posterior[1:]]).log().float()
        self.log_betas = betas.log().float()
        self.of_start = (betas * before.sqrt() / (1 - kept)).float()
        self.of_noisy = ((1 - before) * (1 - betas).sqrt() / (1 - kept)).float()

    def corrupt(self, start: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """x_t of data `start` [n, ...] at steps [n] in 0 … T - 1."""
        return _at(self.signal, step, start) * start + _at(self.noise, step, start) * noise

    def loss(self, output: Tensor, start: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """Squared error of the noise plus the variational bound in bits, [n].

        The bound trains only the variance: the predicted noise is detached.

        Args:
            output: [n, 2 C, h, w], predicted noise, then the variance's position between its bounds (-1 … 1).
            start, noise: [n, C, h, w].
            step: [n].

        Raises:
            ValueError: the output does not have twice the channels of the data.
        """
        if output.shape[1] != 2 * start.shape[1]:
            raise ValueError(f"output: needs {2 * start.shape[1]} channels, got {output.shape[1]}")
        predicted, place = output.float().chunk(2, dim=1)
        error = (predicted - noise).square().flatten(1).mean(dim=1)
        return error + self.bound(predicted.detach(), place, start, noise, step)

    def bound(self, predicted: Tensor, place: Tensor, start: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """A term of the variational bound in bits per dimension, [n]: KL(q || p) for t > 0, -log p(x_0 | x_1) at 0."""
        noisy = self.corrupt(start, noise, step)
        mean, log_variance = self.reverse(predicted, place, noisy, step)
        true_mean = _at(self.of_start, step, start) * start + _at(self.of_noisy, step, start) * noisy
        true_log_variance = _at(self.posterior_log_variance, step, start)
        divergence = 0.5 * (
            log_variance
            - true_log_variance
            + (true_log_variance - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
            - 1.0
        )
        likelihood = -_log_likelihood_of_levels(start, mean, 0.5 * log_variance)
        terms = torch.where(_at(step, None, start) == 0, likelihood, divergence)
        return terms.flatten(1).mean(dim=1) / math.log(2.0)

    def reverse(self, predicted: Tensor, place: Tensor, noisy: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of p(x_{t-1} | x_t) from the predicted noise and the variance's position."""
        start = (noisy - _at(self.noise, step, noisy) * predicted) / _at(self.signal, step, noisy)
        mean = _at(self.of_start, step, noisy) * start + _at(self.of_noisy, step, noisy) * noisy
        low, high = _at(self.posterior_log_variance, step, noisy), _at(self.log_betas, step, noisy)
        share = (place + 1) / 2
        return mean, share * high + (1 - share) * low


def _at(values: Tensor, step: Tensor | None, like: Tensor) -> Tensor:
    """values[step] (or values) as [n, 1, 1, ...], to broadcast with `like` [n, ...]."""
    picked = values if step is None else values.to(step.device)[step]
    return picked.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def _log_likelihood_of_levels(data: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of the bin of width 2/255 around `data` under a normal distribution; the outer bins are open."""
    inverse = (-log_scale).exp()
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.cdf((data - mean + 1 / 255) * inverse)
    below = normal.cdf((data - mean - 1 / 255) * inverse)
    probability = torch.where(data < -0.999, above, torch.where(data > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()
