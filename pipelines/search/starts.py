"""Policies that search over the noise that the pipeline's own trajectory starts from: best-of-n, random and zero-order
search (arXiv 2501.09732)."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastgen.checks import check_number
from fastgen.pipelines.search.engine import Ask, Chain, Node, Program, best_of
from fastgen.pipelines.search.policy import Policy, check_counts
from fastgen.pipelines.search.samplers import Sampler

__all__ = ["BestOfN", "RandomSearch", "StartSearch", "ZeroOrder", "neighbour", "trajectories"]


def _ode(chain: Chain) -> Sampler:
    """The pipeline's own trajectory."""
    return Sampler(chain.denoiser.interpolant, chain.denoiser.times)


def trajectories(
    chain: Chain,
    starts: Sequence[Tensor],
    sampler: Sampler,
    parents: Sequence[Node | None] = (),
) -> Generator[Ask, list[Node], list[Node]]:
    """The ODE from several samples side by side; only its ends are scored."""
    nodes: list[Node] = []
    latents, last = list(starts), sampler.transitions
    for index in range(last + 1):
        nodes = yield chain.ask(latents, index, nodes or parents, sampler, scored=index == last)
        latents = [node.step(None) for node in nodes] if index < last else []
    return nodes


class StartSearch(Policy):
    """A search over the noise that the pipeline's own trajectory starts from: rounds of trajectories, the best end is
    returned.

    Attributes:
        whole: a round is drawn whole or not at all.
    """

    stochastic: ClassVar[bool] = False
    whole: ClassVar[bool] = True

    @abstractmethod
    def rounds_of(self, chain: Chain) -> Generator[list[Tensor], list[Node], None]:
        """Yields the noises of each round and is sent the ends of their trajectories."""

    def least(self, transitions: int) -> int:
        return self.smallest * (transitions + 1)

    @property
    def smallest(self) -> int:
        """Trajectories of the first round, at least."""
        return 1

    def program(self, chain: Chain) -> Program:
        sampler, pool = _ode(chain), chain.pool
        each = sampler.transitions + 1
        best: Node | None = None
        rounds = self.rounds_of(chain)
        starts = next(rounds)
        while not chain.meets(best):
            left = pool.left(chain.number)
            count = len(starts) if left == math.inf else min(len(starts), int(left // each))
            if best is None:
                count = max(count, self.smallest)  # `check` saw to it
            elif count < (len(starts) if self.whole else 1):
                break
            nodes = yield from trajectories(chain, starts[:count], sampler)
            best = best_of([node for node in (best, *nodes) if node is not None])
            try:
                starts = rounds.send(nodes)
            except StopIteration:
                break
        assert best is not None
        return best


@dataclass
class BestOfN(StartSearch):
    """N pictures of the pipeline itself, the best one is returned.

    Attributes:
        n: None: as many as the budget has.
        wave: trajectories side by side.

    Raises:
        ValueError: a number out of range.
    """

    name: ClassVar[str] = "best-of-n"
    whole: ClassVar[bool] = False
    n: int | None = None
    wave: int = 4

    def __post_init__(self) -> None:
        check_counts(self, "wave", *(() if self.n is None else ("n",)))

    @property
    def endless(self) -> bool:
        return self.n is None

    def rounds_of(self, chain: Chain) -> Generator[list[Tensor], list[Node], None]:
        drawn, limit = 0, math.inf if self.n is None else self.n
        while drawn < limit:
            count = int(min(self.wave, limit - drawn))
            drawn += len((yield [chain.first(drawn + i) for i in range(count)]))


@dataclass
class RandomSearch(StartSearch):
    """Rounds of 2, 4, 8 … fresh noises, each round's best kept; the best of all is returned.

    Attributes:
        rounds: None: as many as the budget has.

    Raises:
        ValueError: a number out of range.
    """

    name: ClassVar[str] = "random"
    smallest: ClassVar[int] = 2
    rounds: int | None = None

    def __post_init__(self) -> None:
        if self.rounds is not None:
            check_counts(self, "rounds")

    @property
    def endless(self) -> bool:
        return self.rounds is None

    def rounds_of(self, chain: Chain) -> Generator[list[Tensor], list[Node], None]:
        for number in itertools.count(1) if self.rounds is None else range(1, self.rounds + 1):
            yield [chain.first(2**number - 2 + i) for i in range(2**number)]


@dataclass
class ZeroOrder(StartSearch):
    """Neighbours of a pivot noise; a better one becomes the pivot, else a fresh one is drawn.

    Attributes:
        neighbours: M of a round.
        cosine: between a neighbour and its pivot; neighbours have the pivot's norm.
        rounds: None: as many as the budget has.

    Raises:
        ValueError: a number out of range.
    """

    name: ClassVar[str] = "zero-order"
    neighbours: int = 4
    cosine: float = 0.95
    rounds: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, "neighbours", *(() if self.rounds is None else ("rounds",)))
        check_number("cosine", self.cosine, above=-1, below=1)

    @property
    def smallest(self) -> int:
        return self.neighbours + 1

    @property
    def endless(self) -> bool:
        return self.rounds is None

    def rounds_of(self, chain: Chain) -> Generator[list[Tensor], list[Node], None]:
        pivot, fresh = chain.first(0), 0
        for number in itertools.count() if self.rounds is None else range(self.rounds):
            noises = (chain.noise(number, i) for i in range(self.neighbours))
            starts = [pivot, *(neighbour(pivot, noise, self.cosine) for noise in noises)]
            nodes = yield starts
            pivot = starts[nodes.index(best_of(nodes))]
            if pivot is starts[0]:
                fresh += 1
                pivot = chain.first(fresh)


def neighbour(pivot: Tensor, noise: Tensor, cosine: float) -> Tensor:
    """A point of the pivot's norm at that cosine from it, in the direction of the noise."""
    unit = pivot / pivot.norm()
    across = noise - (noise * unit).sum() * unit
    return pivot.norm() * (cosine * unit + math.sqrt(1 - cosine**2) * across / across.norm())
