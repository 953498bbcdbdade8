"""A denoiser of one-dimensional data and verifiers of it, for tests of searches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.pipelines.search.budget import Budget, Pool
from fastgen.pipelines.search.denoisers.base import FlowDenoiser, Settings
from fastgen.pipelines.search.engine import Chain, Node, run_chains
from fastgen.pipelines.search.interpolants import Prediction
from fastgen.pipelines.search.policy import Policy
from fastgen.pipelines.search.previews import Preview
from fastgen.pipelines.search.samplers import Ancestral, Sampler

TIMES = (1.0, 0.75, 0.5, 0.25)


class ToyDenoiser(FlowDenoiser):
    """Data N(prompt number, 0.5^2) in [1, 1, 1, 2] latents. "Pictures" are the clean samples themselves, as float.

    `rows` has the size of each forward pass.
    """

    def __init__(self, times: Sequence[float], prompts: int = 1, forwards: int = 1) -> None:
        self.times_given, self.forwards_given = list(times), forwards
        self.rows: list[int] = []
        super().__init__(None, [f"prompt {i}" for i in range(prompts)], Settings())

    def prepare(self) -> None:
        self.times, self.forwards = self.times_given, self.forwards_given

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def noise(self, generator: torch.Generator) -> Tensor:
        return torch.randn(1, 1, 1, 2, generator=generator)

    def velocity(self, latents: Tensor, times: Tensor, which: Tensor) -> Tensor:
        self.rows.append(len(latents))
        t = times.to(latents).view(-1, 1, 1, 1)
        mean = which.to(latents).view(-1, 1, 1, 1)
        variance = ((1 - t) * 0.5) ** 2 + t**2
        rest = latents - (1 - t) * mean
        return t / variance * rest - (mean + (1 - t) * 0.25 / variance * rest)

    def decode(self, grid: Tensor) -> Tensor:
        return grid

    def pictures(self, prediction: Prediction, which: Tensor | None = None) -> Tensor:
        return prediction.at(self.final)


def sum_of(pictures: Tensor, prompts: list[str]) -> Tensor:
    """A verifier."""
    return pictures.flatten(1).sum(dim=1)


class Script:
    """A verifier that gives the scores of a list in turn."""

    def __init__(self, scores: list[float]) -> None:
        self.scores: Iterator[float] = iter(scores)

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        return torch.tensor([next(self.scores, 0.0) for _ in prompts])


def run_policy(
    policy: Policy,
    times: Sequence[float] = TIMES,
    verifier: Callable[[Tensor, list[str]], Any] = sum_of,
    max_nfe: int | None = None,
    target_score: float | None = None,
    prompts: int = 1,
    batch_size: int = 32,
    seed: int = 0,
    forwards: int = 1,
    sampler: Sampler | None = None,
    preview: Preview | None = None,
) -> tuple[list[Node], list[Chain], ToyDenoiser]:
    """Run it as the pipeline does."""
    denoiser = ToyDenoiser(times, prompts, forwards)
    path = sampler or Ancestral(denoiser.interpolant, denoiser.times)
    budget = Budget(max_nfe, None, target_score)
    policy.check(budget, path.transitions, forwards)
    chains = []
    for prompt in range(prompts):
        pool = Pool(budget, forwards)
        start = denoiser.noise(torch.Generator().manual_seed(seed + prompt))
        place = (seed + prompt, start, pool)
        chains += [Chain(denoiser, path, prompt, i, *place) for i in range(policy.chains)]
    ends = run_chains(chains, policy.program, verifier, denoiser.prompts, batch_size, preview=preview)
    return ends, chains, denoiser
