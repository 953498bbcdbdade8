"""The engine runs the searches of many prompts and chains, and batches their evaluations.

A policy writes a chain as a generator: it yields samples that it wants evaluated and is sent what came of them, as if
it were alone. The engine gathers what all chains want, runs the model, the decoder and the verifier on it together,
and hands the answers back; chains that are done drop out. So several prompts are in flight, candidates are tried in
waves, and a chain's code knows of neither. Every candidate has its own seed: its noise depends on the prompt's
seed and on its place in the search, not on what is evaluated with it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.errors import NotFiniteError
from fastgen.pipelines.search.budget import Pool
from fastgen.pipelines.search.denoisers.base import Denoiser
from fastgen.pipelines.search.evaluations import Answer, Verifier, evaluate
from fastgen.pipelines.search.interpolants import Prediction
from fastgen.pipelines.search.previews import Preview
from fastgen.pipelines.search.samplers import Sampler

__all__ = [
    "Ask",
    "Chain",
    "Node",
    "Program",
    "Round",
    "SearchStopped",
    "Visit",
    "best_of",
    "better",
    "rank",
    "run_chains",
]


@dataclass(frozen=True, eq=False)
class Node:
    """An evaluated sample.

    Attributes:
        number: of the evaluation, from 0 on, in its chain.
        parent: the node that it was proposed from; None for a start.
        sampler: whose time `index` it is at.
        index: of that time.
        latents: [1, …].
        prediction: of the model, [1, …].
        score: of the clean sample's picture; -inf where there is a fault, NaN where the verifier was not asked.
        picture: [1, 3, H, W] uint8, of the clean sample; kept of scored ends of trajectories only.
        fault: why this node cannot be a result: latents, pixels or a score that are not numbers.
        usable: the latents are numbers, so that a trajectory can continue from here.
    """

    number: int
    parent: Node | None
    sampler: Sampler
    index: int
    latents: Tensor
    prediction: Prediction
    score: float
    picture: Tensor | None = None
    fault: NotFiniteError | None = None
    usable: bool = True

    def step(self, noise: Tensor | None) -> Tensor:
        """A proposal for the next time."""
        return self.sampler.step(self.latents, self.prediction, self.index, noise)

    @property
    def last(self) -> bool:
        """Whether it is at the last time of its sampler."""
        return self.index == self.sampler.transitions


def better(old: Node | None, new: Node) -> Node:
    """The one of the higher score, of usable ones; the earlier one where they are equal."""
    return new if old is None or (new.usable, new.score) > (old.usable, old.score) else old


def best_of(nodes: Sequence[Node]) -> Node:
    """The highest score, the earliest one where several are equal."""
    found = nodes[0]
    for node in nodes[1:]:
        found = better(found, node)
    return found


@dataclass(frozen=True)
class Ask:
    """Samples that a chain wants evaluated.

    Attributes:
        latents: [1, …] each.
        sampler, index: the time that they are at.
        parents: the nodes that they come from.
        scored: whether the verifier is asked as well.
    """

    latents: list[Tensor]
    sampler: Sampler
    index: int
    parents: Sequence[Node | None]
    scored: bool = True

    @property
    def last(self) -> bool:
        """Whether these are ends of trajectories."""
        return self.index == self.sampler.transitions


Program = Generator[Ask, list[Node], Node]


@dataclass(frozen=True, slots=True)
class Visit:
    """The record of a node: its number, its parent's (-1: a start), its time and its score."""

    number: int
    parent: int
    index: int
    score: float

    def row(self) -> list[float | None]:
        """[number, parent, time, score], JSON-ready: without a score None."""
        return [self.number, self.parent, self.index, self.score if math.isfinite(self.score) else None]


@dataclass(frozen=True, slots=True)
class Round:
    """Results of a round of evaluations.

    Attributes:
        running: chains that continue.
        visits: prompt, chain and visit of each evaluated node.
    """

    running: int
    visits: list[tuple[int, int, Visit]]


@dataclass(eq=False)
class Chain:
    """One chain of one prompt: its place in the batch, its random numbers, its record.

    Attributes:
        denoiser: of the call.
        sampler: of stochastic trajectories.
        prompt: index of the prompt.
        number: of the chain.
        seed: of the prompt.
        start: the latents [1, …] that the pipeline itself would start from.
        pool: of the prompt.
        trace: all that was evaluated, in order.
        furthest: the best score at the last time that was reached; what a search that is cut short returns.
        tries: evaluations of each transition, with whether one was accepted, as the policy reports them.
    """

    denoiser: Denoiser
    sampler: Sampler
    prompt: int
    number: int
    seed: int
    start: Tensor
    pool: Pool
    trace: list[Visit] = field(default_factory=list)
    furthest: Node | None = None
    tries: list[tuple[int, bool]] = field(default_factory=list)

    def record(self, node: Node) -> None:
        """Note an evaluated node."""
        parent = -1 if node.parent is None else node.parent.number
        self.trace.append(Visit(node.number, parent, node.index, node.score))
        if self.furthest is None or rank(node) > rank(self.furthest):
            self.furthest = node

    def generator(self, *place: int) -> torch.Generator:
        """Random numbers of a place in the search."""
        text = ",".join(str(number) for number in (self.seed, self.number, *place))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def first(self, number: int) -> Tensor:
        """Latents [1, …] of start `number`; the first of the first chain is the pipeline's own."""
        if number == 0 and self.number == 0:
            return self.start
        return self.denoiser.begin(self.generator(0, number), self.prompt)

    def noise(self, step: int, number: int, trajectory: int = 0) -> Tensor:
        """Noise [1, …] of try `number` at transition `step` of a trajectory."""
        later = (trajectory,) if trajectory else ()
        return self.denoiser.transition_noise(self.generator(1, step, number, *later))

    def ask(
        self,
        latents: list[Tensor],
        index: int,
        parents: Sequence[Node | None] = (),
        sampler: Sampler | None = None,
        scored: bool = True,
    ) -> Ask:
        """An `Ask`, paid for."""
        self.pool.spend(len(latents))
        return Ask(latents, sampler or self.sampler, index, parents or [None] * len(latents), scored)

    def meets(self, node: Node | None) -> bool:
        """Whether the score of a finished picture is what the prompt's search is for."""
        return node is not None and self.pool.budget.met_by(node.score)


def rank(node: Node) -> tuple[bool, int, float]:
    """The order in which nodes are shown as what a search found: those without a fault, late times before early ones,
    then scores."""
    score = -math.inf if math.isnan(node.score) else node.score
    return node.fault is None, node.index, score


class SearchStopped(Exception):
    """Something ended the search: `__cause__` says what. The chains keep what was found until then."""


def run_chains(
    chains: Sequence[Chain],
    program: Callable[[Chain], Program],
    verifier: Verifier,
    prompts: Sequence[str],
    batch_size: int = 32,
    on_round: Callable[[Round], None] | None = None,
    preview: Preview | None = None,
) -> list[Node]:
    """Run the chains to their ends.

    Args:
        chains: of all prompts, with one denoiser.
        program: makes a chain's generator.
        verifier: scores pictures.
        prompts: texts for it.
        batch_size: rows of one forward pass, and pictures of one call of the verifier.
        on_round: called after each round of evaluations.
        preview: makes the pictures that are scored while a trajectory is under way; None: as at its end.

    Returns:
        the node that each chain returned, or the best of its finished pictures where that one scores more.

    Raises:
        SearchStopped: the model or the verifier failed, or the user interrupted.
    """
    results: dict[int, Node] = {}
    running: dict[int, tuple[Program, Ask]] = {}
    try:
        for place, chain in enumerate(chains):
            made = program(chain)
            running[place] = (made, next(made))
        while running:
            asked = [(chains[place], ask) for place, (_, ask) in running.items()]
            answers = _nodes(asked, evaluate(asked, verifier, prompts, batch_size, preview))
            visits = []
            for place, nodes in zip(list(running), answers, strict=True):
                made, _ = running[place]
                chain = chains[place]
                for node in nodes:
                    chain.record(node)
                    visits.append((chain.prompt, chain.number, chain.trace[-1]))
                try:
                    running[place] = (made, made.send(nodes))
                except StopIteration as done:
                    results[place] = _best_end(done.value, chains[place].furthest)
                    del running[place]
            if on_round is not None:
                on_round(Round(len(running), visits))
    except (Exception, KeyboardInterrupt) as error:
        raise SearchStopped(f"search: {type(error).__name__}: {error}") from error
    return [results[place] for place in range(len(chains))]


def _best_end(end: Node, furthest: Node | None) -> Node:
    """A policy may end with a picture and have seen a better one, behind the accepted one of a wave, for instance."""
    if furthest is None or not furthest.last:
        return end
    return furthest if end.last and rank(furthest) > rank(end) else end


def _nodes(asked: list[tuple[Chain, Ask]], answers: Sequence[Answer]) -> list[list[Node]]:
    """The answer for each chain."""
    nodes, left = [], iter(answers)
    for chain, ask in asked:
        own = []
        for row, (latents, parent) in enumerate(zip(ask.latents, ask.parents, strict=True)):
            found = next(left)
            score = found.score if found.fault is None else -math.inf
            picture = found.picture.clone() if found.picture is not None and ask.last else None
            place = (len(chain.trace) + row, parent, ask.sampler, ask.index, latents, found.prediction)
            own.append(Node(*place, score, picture, found.fault, found.usable))
        nodes.append(own)
    return nodes
