"""Policies that search among populations: search over paths (arXiv 2501.09732), sequential Monte Carlo
(arXiv 2306.17775), and blockwise value sampling (CoDe, arXiv 2502.00968)."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastgen.checks import check_number
from fastgen.pipelines.search.engine import Ask, Chain, Node, Program, best_of
from fastgen.pipelines.search.policy import Policy, check_counts
from fastgen.pipelines.search.samplers import Sampler
from fastgen.pipelines.search.starts import trajectories

__all__ = ["Blockwise", "MonteCarlo", "SearchOverPaths"]


@dataclass
class SearchOverPaths(Policy):
    """Seeds are taken to a low noise level; there, copies are noised again and denoised, and each seed's best is kept.

    Attributes:
        seeds, copies: N and K.
        start: the noise level t_0 at which the search begins.
        up, down: how far a copy is noised, and denoised then; `down` is the larger one.
        steps: evaluations of a way down.

    Raises:
        ValueError: a number out of range.
    """

    name: ClassVar[str] = "search-over-paths"
    anywhere: ClassVar[bool] = True
    seeds: int = 2
    copies: int = 5
    start: float = 0.12
    up: float = 0.78
    down: float = 0.81
    steps: int = 10

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "copies", "steps")
        for name in ("start", "up", "down"):
            check_number(name, getattr(self, name))
        if not (0 < self.up < self.down <= 1 and 0 < self.start < 1 and self.start + self.up <= 1):
            raise ValueError(
                f"start, up, down: {self.start}, {self.up}, {self.down} are not allowed, "
                "need 0 < up < down <= 1 and start + up <= 1"
            )

    @property
    def rounds(self) -> int:
        """Ways up and down until the noise is gone."""
        return math.ceil(self.start / (self.down - self.up) - 1e-9)

    def least(self, transitions: int) -> int:
        return self.steps * self.seeds * (1 + self.copies * self.rounds)

    def program(self, chain: Chain) -> Program:
        path = chain.denoiser.interpolant
        level = self.start
        starts = [chain.first(i) for i in range(self.seeds)]
        nodes = yield from self._down(chain, starts, 1.0, level, [None] * self.seeds)
        best = best_of(nodes)
        nodes = [node if node.usable else best for node in nodes]
        kept = [node.prediction.at(path.level(level)) for node in nodes]
        parents = nodes
        for number in range(self.rounds):
            if chain.meets(best) or chain.pool.late:
                break
            after = max(level + self.up - self.down, 0.0)
            low, high = path.level(level), path.level(level + self.up)
            scale = high.alpha / low.alpha
            deviation = math.sqrt(high.sigma**2 - scale**2 * low.sigma**2)
            raised = [
                scale * latents + deviation * chain.noise(number, seed * self.copies + copy)
                for seed, latents in enumerate(kept)
                for copy in range(self.copies)
            ]
            owners = [parent for parent in parents for _ in range(self.copies)]
            nodes = yield from self._down(chain, raised, level + self.up, after, owners)
            groups = [nodes[seed * self.copies : (seed + 1) * self.copies] for seed in range(self.seeds)]
            parents = [best_of(group) for group in groups]
            best = best_of([best, *parents])
            parents = [node if node.usable else best_of(parents) for node in parents]
            level = after
            kept = [node.prediction.at(path.level(level)) for node in parents]
        return best

    def _down(
        self, chain: Chain, latents: list[Tensor], begin: float, end: float, parents: Sequence[Node | None]
    ) -> Generator[Ask, list[Node], list[Node]]:
        """The ODE from level `begin` towards `end`: the prediction of the last evaluation is scored."""
        times = [begin + (end - begin) * i / self.steps for i in range(self.steps)]
        sampler = Sampler(chain.denoiser.interpolant, times)
        return (yield from trajectories(chain, latents, sampler, parents=parents))


@dataclass
class MonteCarlo(Policy):
    """Sequential Monte Carlo: particles weighted by exp(score / temperature), resampled where few carry the weight.

    Attributes:
        particles: N.
        temperature: lambda of the weights.
        threshold: resample when the effective number of particles is below this share; 1: after every step.

    Raises:
        ValueError: a number out of range.
    """

    name: ClassVar[str] = "smc"
    particles: int = 50
    temperature: float = 0.5
    threshold: float = 1.0

    def __post_init__(self) -> None:
        check_counts(self, "particles")
        check_number("temperature", self.temperature, above=0)
        check_number("threshold", self.threshold, 0, 1)

    def least(self, transitions: int) -> int:
        return self.particles * (transitions + 1)

    def program(self, chain: Chain) -> Program:
        n = self.particles
        nodes = yield chain.ask([chain.first(i) for i in range(n)], 0)
        weights = self._log_weights([node.score for node in nodes])
        for step in range(chain.sampler.transitions):
            # At equal weights the effective number is n itself, and nothing is gained by resampling.
            shares = weights.div(self.temperature).softmax(dim=0)
            if float(1 / shares.square().sum()) < self.threshold * n - 1e-9:
                coins = torch.multinomial(shares, n, replacement=True, generator=chain.generator(2, step))
                nodes, weights = [nodes[i] for i in coins.tolist()], torch.zeros(n, dtype=torch.float64)
            before = [node.score for node in nodes]
            nodes = yield chain.ask([node.step(chain.noise(step, i)) for i, node in enumerate(nodes)], step + 1, nodes)
            gained = [self._gain(node.score, old) for node, old in zip(nodes, before, strict=True)]
            weights = self._log_weights(gained, weights)
        return best_of(nodes)  # the weights hold gains since the last resampling, not scores

    @staticmethod
    def _gain(score: float, before: float) -> float:
        """The gain of a step; a picture without a score before has lost nothing."""
        return score if before == -math.inf else score - before

    def _log_weights(self, gains: list[float], before: Tensor | None = None) -> Tensor:
        """Times the temperature, and so that the largest is 0; all alike where there is no score."""
        # Divided last, so that a tiny temperature leaves 0 and -inf, not a difference of infinities.
        raw = torch.tensor(gains, dtype=torch.float64)
        raw = raw if before is None else before + raw
        top = raw.max()
        return torch.zeros_like(raw) if top == -math.inf else raw - top


@dataclass
class Blockwise(Policy):
    """CoDe: K trajectories of L transitions from each beam; the search continues with the best end.

    Attributes:
        chains: beams.
        candidates: K.
        block: L.

    Raises:
        ValueError: a number out of range.
    """

    name: ClassVar[str] = "code"
    chains: int = 2
    candidates: int = 25
    block: int = 2

    def __post_init__(self) -> None:
        check_counts(self, "chains", "candidates", "block")

    def least(self, transitions: int) -> int:
        return self.chains * self.candidates * (transitions + 1)

    def program(self, chain: Chain) -> Program:
        last = chain.sampler.transitions
        starts = [chain.first(i) for i in range(self.candidates)]
        nodes = yield chain.ask(starts, 0, scored=self._selects(0, last))
        for step in range(last):
            if self._selects(step, last):
                nodes = [best_of(nodes)] * self.candidates
            proposals = [node.step(chain.noise(step, i)) for i, node in enumerate(nodes)]
            nodes = yield chain.ask(proposals, step + 1, nodes, scored=self._selects(step + 1, last))
        return best_of(nodes)

    def _selects(self, index: int, last: int) -> bool:
        """Whether the beam is chosen at that time: after every L evaluations, and at the end."""
        return (index + 1) % self.block == 0 or index == last
