"""The engine: programs of many prompts and chains, whose evaluations share forward passes.

A policy writes a chain as a generator: it yields samples that it wants evaluated and is sent what came of them, as if
it were alone. The engine gathers what all chains want, runs the model, the decoder and the verifier on it together,
and hands the answers back; chains that are done drop out. So several prompts are in flight, candidates are tried in
waves, and a chain's code knows of neither. Every candidate has a seed of its own: its noise depends on the prompt's
seed and on its place in the search, not on what is evaluated beside it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.accounting import add_verifier_calls, phase
from fastgen.pipelines.search.budget import Pool
from fastgen.pipelines.search.denoisers.base import Denoiser
from fastgen.pipelines.search.interpolants import Prediction
from fastgen.pipelines.search.samplers import Sampler

__all__ = ["Ask", "Chain", "Node", "Program", "SearchStopped", "Visit", "best_of", "better", "run_chains"]

#: Scores pictures [k, 3, H, W] uint8 of k prompts: [k].
Verifier = Callable[[Tensor, list[str]], Tensor]


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
        score: of the clean sample's picture; -inf where the verifier gave no number, NaN where it was not asked.
    """

    number: int
    parent: Node | None
    sampler: Sampler
    index: int
    latents: Tensor
    prediction: Prediction
    score: float

    def step(self, noise: Tensor | None) -> Tensor:
        """A proposal for the next time."""
        return self.sampler.step(self.latents, self.prediction, self.index, noise)

    @property
    def last(self) -> bool:
        """Whether it is at the last time of its sampler."""
        return self.index == self.sampler.transitions


def better(old: Node | None, new: Node) -> Node:
    """The one of the higher score; the earlier one where they are equal."""
    return new if old is None or new.score > old.score else old


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


Program = Generator[Ask, list[Node], Node]


@dataclass(frozen=True, slots=True)
class Visit:
    """What is kept of a node: its number, its parent's (-1: a start), its time and its score."""

    number: int
    parent: int
    index: int
    score: float


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
        furthest: the best score at the last time that was reached; what a search that is cut short has to show.
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
        best = self.furthest
        if best is None or (node.index, _number(node.score)) > (best.index, _number(best.score)):
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
        return self.denoiser.noise(self.generator(0, number))

    def noise(self, step: int, number: int) -> Tensor:
        """Noise [1, …] of try `number` at transition `step`."""
        return self.denoiser.restless(self.generator(1, step, number))

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

    def follow(self, node: Node, scored: bool = True) -> Program:
        """The ODE from a node to the last time of its sampler."""
        while not node.last:
            last = node.index + 1 == node.sampler.transitions
            (node,) = yield self.ask(
                [node.step(None)], node.index + 1, [node], sampler=node.sampler, scored=scored and last
            )
        return node


def _number(score: float) -> float:
    return -math.inf if math.isnan(score) else score


class SearchStopped(Exception):
    """Something ended the search: `__cause__` says what. The chains hold what was found until then."""


def run_chains(
    chains: Sequence[Chain],
    program: Callable[[Chain], Program],
    verifier: Verifier,
    prompts: Sequence[str],
    batch_size: int = 32,
    on_round: Callable[[int], None] | None = None,
) -> list[Node]:
    """Run the chains to their ends.

    Args:
        chains: of all prompts, with one denoiser.
        program: makes a chain's generator.
        verifier: scores pictures.
        prompts: texts for it.
        batch_size: rows of one forward pass, and pictures of one call of the verifier.
        on_round: called after each round of evaluations with how many chains are still running.

    Returns:
        the node that each chain returned.

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
            answers = _evaluate(
                [(chains[place], ask) for place, (_, ask) in running.items()], verifier, prompts, batch_size
            )
            for place, nodes in zip(list(running), answers, strict=True):
                made, _ = running[place]
                for node in nodes:
                    chains[place].record(node)
                try:
                    running[place] = (made, made.send(nodes))
                except StopIteration as done:
                    results[place] = done.value
                    del running[place]
            if on_round is not None:
                on_round(len(running))
    except (Exception, KeyboardInterrupt) as error:
        raise SearchStopped(f"search: {type(error).__name__}: {error}") from error
    return [results[place] for place in range(len(chains))]


def _evaluate(
    asked: list[tuple[Chain, Ask]], verifier: Verifier, prompts: Sequence[str], batch_size: int
) -> list[list[Node]]:
    """Evaluate what all chains ask, in slices of `batch_size`."""
    rows = [(chain, ask, row) for chain, ask in asked for row in range(len(ask.latents))]
    scores = [math.nan] * len(rows)
    predictions: list[Prediction] = []
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        said = _predict(part)
        predictions += [Prediction(said.clean[i : i + 1], said.noise[i : i + 1]) for i in range(len(part))]
        wanted = [i for i, (_, ask, _) in enumerate(part) if ask.scored]
        if wanted:
            chosen = Prediction(said.clean[wanted], said.noise[wanted])
            pictures = part[0][0].denoiser.pictures(chosen)
            found = _score(verifier, pictures, [prompts[part[i][0].prompt] for i in wanted])
            for i, score in zip(wanted, found, strict=True):
                scores[first + i] = score
    answers: list[list[Node]] = []
    place = 0
    for chain, ask in asked:
        nodes = []
        for row, latents in enumerate(ask.latents):
            number = len(chain.trace) + row
            nodes.append(
                Node(number, ask.parents[row], ask.sampler, ask.index, latents, predictions[place], scores[place])
            )
            place += 1
        answers.append(nodes)
    return answers


def _predict(part: list[tuple[Chain, Ask, int]]) -> Prediction:
    denoiser = part[0][0].denoiser
    places = [ask.sampler.model_level(ask.index, denoiser.interpolant) for _, ask, _ in part]
    latents = torch.cat([ask.latents[row] for _, ask, row in part])
    times = torch.tensor([time for time, _ in places], dtype=torch.float64, device=latents.device)
    scale = torch.tensor([scale for _, scale in places]).to(latents).view(-1, *[1] * (latents.ndim - 1))
    which = torch.tensor([chain.prompt for chain, _, _ in part], device=latents.device)
    return denoiser.predict(latents / scale, times, which)


def _score(verifier: Verifier, pictures: Tensor, prompts: list[str]) -> list[float]:
    """Scores as floats; what is no number is -inf and never wins.

    Raises:
        ValueError: not one score for each picture.
    """
    with phase("verifier"):
        add_verifier_calls(len(pictures))
        found = torch.as_tensor(verifier(pictures, prompts))
    if found.shape != (len(pictures),):
        raise ValueError(
            f"verifier: returned shape {tuple(found.shape)}, needs ({len(pictures)},), one for each picture"
        )
    values: list[float] = found.double().cpu().tolist()
    return [value if math.isfinite(value) else -math.inf for value in values]
