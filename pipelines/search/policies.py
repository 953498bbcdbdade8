"""Policies that search transition by transition: one loop, which asks a policy how often to try and what to accept.

- `Threshold`: Verifier-Threshold (arXiv 2512.08985): the first candidate above tau is gone on with, and what is not
  tried is left for later.
- `Rollover`: RBF (arXiv 2503.19385): the first candidate above the best score so far, a quota for each transition, and
  what is left of it goes to the next.
- `ValueSampling`: SVDD-PM (arXiv 2408.08252): the best of K candidates at each transition.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fastgen.contracts import Loss
from fastgen.pipelines.search.budget import Budget
from fastgen.pipelines.search.engine import Ask, Chain, Node, Program, better
from fastgen.pipelines.search.thresholds import BestSoFar, Fixed
from fastgen.pipelines.search.thresholds import Threshold as Tau

__all__ = ["Policy", "Rollover", "StepPolicy", "Threshold", "ValueSampling", "check_counts"]


class Policy(ABC):
    """A way to search. One object serves all prompts; what a chain remembers lives in its program.

    Attributes:
        name: of the method.
        chains: of every prompt; the best end of them is returned.
        stochastic: whether transitions need noise.
        anywhere: whether the model is asked at levels that are not on its own schedule.
    """

    name: ClassVar[str]
    loss: ClassVar[Loss] = "lossy"
    stochastic: ClassVar[bool] = True
    anywhere: ClassVar[bool] = False
    chains: int = 1

    @abstractmethod
    def program(self, chain: Chain) -> Program:
        """A chain's search: yields what it wants evaluated, returns the node whose picture it ends with."""

    def least(self, transitions: int) -> int:
        """Evaluations of one prompt without which there is no picture."""
        return self.chains * (transitions + 1)

    @property
    def endless(self) -> bool:
        """Whether nothing but a budget ends the search."""
        return False

    def check(self, budget: Budget, transitions: int, cost: int) -> None:
        """Refuse a budget before anything is evaluated.

        Args:
            budget: of each prompt.
            transitions: of a trajectory.
            cost: forward passes of an evaluation.

        Raises:
            ValueError: it is smaller than a picture takes, or does not end the search.
        """
        least = self.least(transitions) * cost
        if budget.max_nfe is not None and budget.max_nfe < least:
            raise ValueError(
                f"max_nfe: {budget.max_nfe} is not allowed, policy {self.name} needs at least {least} here"
            )
        if self.endless and budget.max_nfe is None and budget.max_seconds is None:
            raise ValueError(f"max_nfe, max_seconds: policy {self.name} needs one of them, or it would not end")

    @property
    def description(self) -> str:
        """Name and settings, for the report."""
        return self.name


def check_counts(policy: Policy, *names: str) -> None:
    """Refuse attributes that are no whole numbers above 0.

    Raises:
        ValueError: names the attribute.
    """
    for name in names:
        value = getattr(policy, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {value!r} is not allowed, needs an integer >= 1")


@dataclass
class _State:
    """What the loop knows of a chain."""

    chain: Chain
    scores: list[float] = field(default_factory=list)
    best: Node | None = None
    accepted: float = -math.inf

    def see(self, node: Node) -> float:
        """Take a node in; the best score before it."""
        before = -math.inf if self.best is None else self.best.score
        self.scores.append(node.score)
        self.best = better(self.best, node)
        return before


class StepPolicy(Policy):
    """The loop over transitions (section 3.2 of our specification).

    Attributes:
        starts: noises that are drawn and scored before the first transition; the best is gone on with.
        wave: candidates that are tried together. It changes what a search costs, not what it finds: what comes behind
            the accepted one of a wave is paid for and forgotten.
        reserve: a trajectory that was begun can always be finished.
    """

    starts: int = 1
    wave: int = 1
    reserve: bool = True

    def least(self, transitions: int) -> int:
        return self.chains * (self.starts + transitions)

    @abstractmethod
    def may_try(self, step: int, tries: int, left: float, memory: dict[str, float]) -> bool:
        """Whether transition `step` may be tried once more after `tries`, with so many evaluations left beyond what
        finishing takes."""

    @abstractmethod
    def accept(self, step: int, score: float, before: float, state: _State) -> bool:
        """Whether a candidate is gone on with; `before` is the best score before it."""

    def on_advance(self, step: int, tries: int, accepted: bool, memory: dict[str, float]) -> None:
        """After a transition."""

    def enough(self, score: float, state: _State) -> bool:
        """Whether no further start is drawn after one of that score."""
        return False

    def end(self, best: Node, step_best: Node) -> Node:
        """What is returned of the best node of all and the best one at the last time that was reached."""
        return step_best

    def remember(self, chain: Chain) -> dict[str, float]:
        """What the policy keeps of a chain from transition to transition."""
        return {}

    def program(self, chain: Chain) -> Program:
        state, memory, pool = _State(chain), self.remember(chain), chain.pool
        last = chain.sampler.transitions
        self._owe(chain, last)
        node = yield from self._start(state)
        step_best = node
        for step in range(last):
            found: Node | None = None
            tries, accepted = 0, False
            while not accepted and (width := self._width(step, tries, chain, memory)) > 0:
                proposals = [node.step(chain.noise(step, tries + i)) for i in range(width)]
                self._owe(chain, last - step - 1)
                answers = yield chain.ask(proposals, step + 1, [node] * width)
                for candidate in answers:
                    tries += 1
                    before = state.see(candidate)
                    found = better(found, candidate)
                    if self.accept(step, candidate.score, before, state):
                        found, accepted = candidate, True
                        self._good(candidate, chain)
                        break
                    if self._good(candidate, chain):
                        found = candidate
                        break
                if pool.done:
                    break
            if found is None and pool.done:
                break
            if found is None and (self.reserve or pool.late):  # the one try that finishing takes
                (found,) = yield chain.ask([node.step(chain.noise(step, 0))], step + 1, [node])
                state.see(found)
                tries = 1
            if found is None:
                break
            chain.tries.append((tries, accepted))
            self.on_advance(step, tries, accepted, memory)
            node = step_best = found
            state.accepted = node.score
        pool.owed.pop(chain.number, None)
        return self.end(state.best or node, step_best)

    def _start(self, state: _State) -> Generator[Ask, list[Node], Node]:
        chain, best = state.chain, None
        for first in range(0, self.starts, self.wave):
            count = min(self.wave, self.starts - first)
            if first and chain.pool.left(chain.number) < count:
                break
            for node in (yield chain.ask([chain.first(first + i) for i in range(count)], 0)):
                state.see(node)
                best = better(best, node)
                if self.enough(node.score, state):
                    state.accepted = node.score
                    return node
        assert best is not None
        state.accepted = best.score
        return best

    def _width(self, step: int, tries: int, chain: Chain, memory: dict[str, float]) -> int:
        """How many candidates to try now: as many of a wave as may be tried one after the other."""
        # Of what the chain keeps back for itself, one evaluation is for this transition.
        left = chain.pool.left(chain.number) + (1 if self.reserve and tries == 0 else 0)
        width = 0
        while width < self.wave and left - width >= 1 and self.may_try(step, tries + width, left - width, memory):
            width += 1
        return width

    def _owe(self, chain: Chain, transitions: int) -> None:
        chain.pool.owed[chain.number] = transitions if self.reserve else 0

    def _good(self, node: Node, chain: Chain) -> bool:
        """Whether a finished picture is good enough: then all chains of the prompt are done."""
        if node.last and chain.pool.budget.met_by(node.score):
            chain.pool.done = True
        return chain.pool.done


@dataclass
class Threshold(StepPolicy):
    """Verifier-Threshold, our reconstruction.

    Attributes:
        tau: what a candidate has to exceed.
        starts, wave, chains: see `StepPolicy` and `Policy`.
        init: "best" of all starts, or "threshold": the first start above tau, of so many at most.
        patience: tries of a transition at most; None: as many as the budget has.
        returns: "last", the best at the last time that was reached, or "best", the best of all previews.

    Raises:
        ValueError: a number out of range.
    """

    name: ClassVar[str] = "threshold"
    tau: Tau | float = 0.5
    starts: int = 1
    wave: int = 1
    chains: int = 1
    init: Literal["best", "threshold"] = "best"
    patience: int | None = None
    returns: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        check_counts(self, "chains", "starts", "wave", *(() if self.patience is None else ("patience",)))
        if self.init not in ("best", "threshold"):
            raise ValueError(f"init: {self.init!r} is not allowed, needs best or threshold")
        if self.returns not in ("last", "best"):
            raise ValueError(f"returns: {self.returns!r} is not allowed, needs last or best")

    def may_try(self, step: int, tries: int, left: float, memory: dict[str, float]) -> bool:
        return self.patience is None or tries < self.patience

    @property
    def rule(self) -> Tau:
        """The threshold; a number is the same one for all times."""
        return self.tau if isinstance(self.tau, Tau) else Fixed(float(self.tau))

    def accept(self, step: int, score: float, before: float, state: _State) -> bool:
        return score > self.rule.at(step + 1, state.scores[:-1], state.accepted, before)

    def enough(self, score: float, state: _State) -> bool:
        before = state.scores[:-1]
        return self.init == "threshold" and score > self.rule.at(0, before, -math.inf, max(before, default=-math.inf))

    def end(self, best: Node, step_best: Node) -> Node:
        return best if self.returns == "best" else step_best

    @property
    def endless(self) -> bool:
        return self.patience is None

    @property
    def description(self) -> str:
        return f"{self.name}, tau {self.rule.name}"


@dataclass
class Rollover(StepPolicy):
    """Rollover budget forcing. Its chains run in lock-step; the last transition takes all that is left.

    Attributes:
        chains, starts: of the paper: 2 chains with 25 starts each.
        wave: see `StepPolicy`.
        quota: tries of a transition; None takes what the budget gives, (max_nfe - starts) / times for each chain.

    Raises:
        ValueError: a number out of range, or a budget in which there is no try for each transition.
    """

    name: ClassVar[str] = "rbf"
    chains: int = 2
    starts: int = 25
    wave: int = 1
    quota: int | None = None
    reserve: ClassVar[bool] = False  # type: ignore[misc]

    def __post_init__(self) -> None:
        check_counts(self, "chains", "starts", "wave", *(() if self.quota is None else ("quota",)))

    def least(self, transitions: int) -> int:
        return self.chains * (self.starts + transitions + 1)

    def check(self, budget: Budget, transitions: int, cost: int) -> None:
        super().check(budget, transitions, cost)
        if self.quota is None and budget.max_nfe is None:
            raise ValueError("max_nfe: policy rbf needs it, or a quota")

    def remember(self, chain: Chain) -> dict[str, float]:
        limit, times = chain.pool.budget.max_nfe, chain.sampler.transitions + 1
        quota = self.quota
        if quota is None:
            assert limit is not None  # as `check` saw to
            quota = (limit // chain.pool.cost - self.starts * self.chains) // (times * self.chains)
        return {"base": quota, "quota": quota, "last": chain.sampler.transitions - 1}

    def may_try(self, step: int, tries: int, left: float, memory: dict[str, float]) -> bool:
        if step == memory["last"]:
            return left < math.inf or tries < memory["quota"]
        return tries < memory["quota"]

    def accept(self, step: int, score: float, before: float, state: _State) -> bool:
        return step < state.chain.sampler.transitions - 1 and score > before

    def on_advance(self, step: int, tries: int, accepted: bool, memory: dict[str, float]) -> None:
        memory["quota"] = memory["base"] + (memory["quota"] - tries if accepted else 0)

    def end(self, best: Node, step_best: Node) -> Node:
        # Where the budget ends before the last time, the reference returns a stale prediction; we the best preview.
        return step_best if step_best.last else best

    @property
    def description(self) -> str:
        return f"{self.name}, tau {BestSoFar().name}"


@dataclass
class ValueSampling(StepPolicy):
    """SVDD-PM: every transition takes the best of K proposals.

    Attributes:
        chains: beams.
        candidates: K, of every transition and of the starts.

    Raises:
        ValueError: a number out of range.
    """

    name: ClassVar[str] = "svdd"
    chains: int = 2
    candidates: int = 25

    def __post_init__(self) -> None:
        check_counts(self, "chains", "candidates")
        self.starts = self.wave = self.candidates

    def least(self, transitions: int) -> int:
        return self.chains * self.candidates * (transitions + 1)

    def may_try(self, step: int, tries: int, left: float, memory: dict[str, float]) -> bool:
        return tries < self.candidates

    def accept(self, step: int, score: float, before: float, state: _State) -> bool:
        return False
