"""The engine: programs of many prompts and chains, whose evaluations share forward passes.

A policy writes a chain as a generator: it yields samples that it wants evaluated and is sent what came of them, as if
it were alone. The engine gathers what all chains want, runs the model, the decoder and the verifier on it together,
and hands the answers back; chains that are done drop out. So several prompts are in flight, candidates are tried in
waves, and a chain's code knows of neither. Every candidate has a seed of its own: its noise depends on the prompt's
seed and on its place in the search, not on what is evaluated beside it.

A chain may explore: candidates are evaluated with other knobs of the model's compute ("exploring effort"), and what is
gone on with is evaluated anew at full effort. Evaluations of different efforts do not share forward passes.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen.accounting import add_verifier_calls, current, phase
from fastgen.pipelines.search.budget import Pool
from fastgen.pipelines.search.denoisers.base import Denoiser
from fastgen.pipelines.search.interpolants import Prediction
from fastgen.pipelines.search.previews import Preview
from fastgen.pipelines.search.samplers import Sampler

__all__ = [
    "Ask",
    "Chain",
    "Effort",
    "Node",
    "Program",
    "SearchStopped",
    "Visit",
    "best_of",
    "better",
    "rank",
    "run_chains",
]

#: Scores pictures [k, 3, H, W] uint8 of k prompts: [k].
Verifier = Callable[[Tensor, list[str]], Tensor]
#: Of an evaluation; "anew": at full effort, of what had been evaluated at the exploring one.
Effort = Literal["full", "exploring", "anew"]


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
        effort: of the evaluation.
        picture: [1, 3, H, W] uint8, of the clean sample; kept of scored ends of trajectories only.
    """

    number: int
    parent: Node | None
    sampler: Sampler
    index: int
    latents: Tensor
    prediction: Prediction
    score: float
    effort: Effort = "full"
    picture: Tensor | None = None

    @property
    def explored(self) -> bool:
        """Whether it was evaluated at the exploring effort."""
        return self.effort == "exploring"

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
        effort: of the evaluations.
    """

    latents: list[Tensor]
    sampler: Sampler
    index: int
    parents: Sequence[Node | None]
    scored: bool = True
    effort: Effort = "full"

    @property
    def last(self) -> bool:
        """Whether these are ends of trajectories."""
        return self.index == self.sampler.transitions


Program = Generator[Ask, list[Node], Node]


@dataclass(frozen=True, slots=True)
class Visit:
    """What is kept of a node: its number, its parent's (-1: a start), its time, its score and its effort."""

    number: int
    parent: int
    index: int
    score: float
    effort: Effort = "full"


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
        explore: knobs of the exploring effort; empty: the chain does not explore.
        trace: all that was evaluated, in order.
        furthest: the best score at the last time that was reached, at full effort if anything was evaluated so; what
            a search that is cut short has to show.
        tries: evaluations of each transition, with whether one was accepted, as the policy reports them.
    """

    denoiser: Denoiser
    sampler: Sampler
    prompt: int
    number: int
    seed: int
    start: Tensor
    pool: Pool
    explore: dict[str, Any] = field(default_factory=dict)
    trace: list[Visit] = field(default_factory=list)
    furthest: Node | None = None
    tries: list[tuple[int, bool]] = field(default_factory=list)

    def record(self, node: Node) -> None:
        """Note an evaluated node."""
        parent = -1 if node.parent is None else node.parent.number
        self.trace.append(Visit(node.number, parent, node.index, node.score, node.effort))
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
        return self.denoiser.noise(self.generator(0, number))

    def noise(self, step: int, number: int, trajectory: int = 0) -> Tensor:
        """Noise [1, …] of try `number` at transition `step` of a trajectory."""
        later = (trajectory,) if trajectory else ()
        return self.denoiser.restless(self.generator(1, step, number, *later))

    def ask(
        self,
        latents: list[Tensor],
        index: int,
        parents: Sequence[Node | None] = (),
        sampler: Sampler | None = None,
        scored: bool = True,
        effort: Effort = "full",
    ) -> Ask:
        """An `Ask`, paid for."""
        self.pool.spend(len(latents))
        return Ask(latents, sampler or self.sampler, index, parents or [None] * len(latents), scored, effort)

    def meets(self, node: Node | None) -> bool:
        """Whether the score of a finished picture is what the prompt's search is for."""
        return node is not None and self.pool.budget.met_by(node.score)

    def anew(self, node: Node, scored: bool = False) -> Program:
        """A node at full effort: it takes the place of the one that was explored."""
        if node.explored:
            (node,) = yield self.ask([node.latents], node.index, [node.parent], node.sampler, scored, effort="anew")
        return node


def rank(node: Node) -> tuple[bool, int, float]:
    """The order in which nodes are shown as what a search found: full effort before exploring, late times before early
    ones, then scores."""
    return not node.explored, node.index, -math.inf if math.isnan(node.score) else node.score


class SearchStopped(Exception):
    """Something ended the search: `__cause__` says what. The chains hold what was found until then."""


def run_chains(
    chains: Sequence[Chain],
    program: Callable[[Chain], Program],
    verifier: Verifier,
    prompts: Sequence[str],
    batch_size: int = 32,
    on_round: Callable[[int], None] | None = None,
    preview: Preview | None = None,
) -> list[Node]:
    """Run the chains to their ends.

    Args:
        chains: of all prompts, with one denoiser.
        program: makes a chain's generator.
        verifier: scores pictures.
        prompts: texts for it.
        batch_size: rows of one forward pass, and pictures of one call of the verifier.
        on_round: called after each round of evaluations with how many chains are still running.
        preview: makes the pictures that are scored while a trajectory is under way; None: as at its end.

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
            asked = [(chains[place], ask) for place, (_, ask) in running.items()]
            answers = _evaluate(asked, verifier, prompts, batch_size, preview)
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


_Row = tuple[Chain, Ask, int]


def _evaluate(
    asked: list[tuple[Chain, Ask]],
    verifier: Verifier,
    prompts: Sequence[str],
    batch_size: int,
    preview: Preview | None,
) -> list[list[Node]]:
    """Evaluate what all chains ask, in slices of `batch_size`."""
    rows = [(chain, ask, row) for chain, ask in asked for row in range(len(ask.latents))]
    predictions: dict[int, Prediction] = {}
    scores: dict[int, float] = {}
    pictures: dict[int, Tensor] = {}
    for part in _slices(rows, batch_size):
        said = _predict([rows[i] for i in part])
        predictions |= {i: Prediction(said.clean[j : j + 1], said.noise[j : j + 1]) for j, i in enumerate(part)}
        for cheap in (False, True):
            wanted = [
                j
                for j, i in enumerate(part)
                if rows[i][1].scored and cheap == (preview is not None and not rows[i][1].last)
            ]
            if not wanted:
                continue
            chosen = [rows[part[j]] for j in wanted]
            shown = _shown(chosen, Prediction(said.clean[wanted], said.noise[wanted]), preview if cheap else None)
            found = _score(verifier, shown, [prompts[chain.prompt] for chain, _, _ in chosen])
            scores |= {part[j]: score for j, score in zip(wanted, found, strict=True)}
            pictures |= {part[j]: shown[k : k + 1].clone() for k, j in enumerate(wanted) if chosen[k][1].last}
    nodes = []
    for i, (chain, ask, row) in enumerate(rows):
        place = (len(chain.trace) + row, ask.parents[row], ask.sampler, ask.index, ask.latents[row])
        nodes.append(Node(*place, predictions[i], scores.get(i, math.nan), ask.effort, pictures.get(i)))
    ends = list(itertools.accumulate(len(ask.latents) for _, ask in asked))
    return [nodes[first:end] for first, end in zip([0, *ends], ends, strict=False)]


def _slices(rows: Sequence[_Row], batch_size: int) -> Iterator[list[int]]:
    """Places of the rows, full effort first, in slices of one effort."""
    for exploring in (False, True):
        places = [i for i, (_, ask, _) in enumerate(rows) if (ask.effort == "exploring") == exploring]
        for first in range(0, len(places), batch_size):
            yield places[first : first + batch_size]


def _predict(part: Sequence[_Row]) -> Prediction:
    chain, ask, _ = part[0]
    denoiser = chain.denoiser
    places = [ask.sampler.model_level(ask.index, denoiser.interpolant) for _, ask, _ in part]
    latents = torch.cat([ask.latents[row] for _, ask, row in part])
    times = torch.tensor([time for time, _ in places], dtype=torch.float64, device=latents.device)
    scale = torch.tensor([scale for _, scale in places]).to(latents).view(-1, *[1] * (latents.ndim - 1))
    which = torch.tensor([chain.prompt for chain, _, _ in part], device=latents.device)
    with denoiser.at_effort(chain.explore if ask.effort == "exploring" else {}), _billed(part):
        return denoiser.predict(latents / scale, times, which)


def _shown(part: Sequence[_Row], said: Prediction, preview: Preview | None) -> Tensor:
    """Pictures [k, 3, H, W] uint8."""
    denoiser = part[0][0].denoiser
    with _billed(part):
        return denoiser.pictures(said) if preview is None else preview(denoiser, said)


@contextmanager
def _billed(part: Sequence[_Row]) -> Iterator[None]:
    """FLOPs of what runs inside, where they are counted, in equal parts to the rows' prompts."""
    stats = current()
    before = 0 if stats is None else stats.flops
    yield
    if stats is not None and stats.flops > before:
        for chain, _, _ in part:
            chain.pool.flops += (stats.flops - before) / len(part)


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
