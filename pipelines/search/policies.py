"""Policies that search transition by transition: one loop, which asks a policy how often to try and what to accept.

- `Threshold`: Verifier-Threshold (arXiv 2512.08985): the first candidate above tau is gone on with, and what is not
  tried is left for later.
- `Rollover`: RBF (arXiv 2503.19385): the first candidate above the best score so far, a quota for each transition, and
  what is left of it goes to the next.
- `ValueSampling`: SVDD-PM (arXiv 2408.08252): the best of K candidates at each transition.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from fastgen.pipelines.search.budget import Budget
from fastgen.pipelines.search.calibration import Calibration
from fastgen.pipelines.search.engine import Ask, Chain, Effort, Node, Program, better
from fastgen.pipelines.search.policy import Policy, check_counts
from fastgen.pipelines.search.thresholds import BestSoFar, Fixed, OnlineQuantile, check_in_range
from fastgen.pipelines.search.thresholds import Threshold as Tau

__all__ = ["Policy", "Rollover", "StepPolicy", "Threshold", "ValueSampling", "check_counts"]


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
        previews: what is returned may be another node than the last one that was gone on with.
    """

    starts: int = 1
    wave: int = 1
    reserve: bool = True

    @property
    def previews(self) -> bool:
        return False

    def least(self, transitions: int) -> int:
        return self.chains * (self.starts + transitions)

    def anew(self, transitions: int) -> int | None:
        return self.chains * ((self.starts > 1) + self.previews) if transitions else 0

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
        node = yield from self._start(state)
        step_best = node
        for step in range(last):
            found: Node | None = None
            tries, accepted = 0, False
            effort = self._effort(step, chain, memory)
            while not accepted and (width := self._width(step, tries, chain, memory, effort)) > 0:
                proposals = [node.step(chain.noise(step, tries + i)) for i in range(width)]
                self._owe(chain, last - step - 1, effort)
                answers = yield chain.ask(proposals, step + 1, [node] * width, effort=effort)
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
            if found is None and (self.reserve or (pool.late and pool.affords(1))):  # what finishing takes
                (found,) = yield chain.ask([node.step(chain.noise(step, 0))], step + 1, [node])
                state.see(found)
                tries = 1
            if found is None:
                break
            chain.tries.append((tries, accepted))
            self.on_advance(step, tries, accepted, memory)
            state.accepted = found.score
            node = step_best = found if pool.done else (yield from chain.anew(found))
        pool.owed.pop(chain.number, None)
        end = self.end(state.best or node, step_best)
        if not end.explored or pool.done:
            return end
        # Without a reserve the budget may end here, and then the last one that was gone on with is the picture.
        return (yield from chain.anew(end, scored=True)) if pool.affords(1) else node

    def _start(self, state: _State) -> Generator[Ask, list[Node], Node]:
        chain, best, last = state.chain, None, state.chain.sampler.transitions
        effort: Effort = "exploring" if chain.explore and last and self.starts > 1 else "full"
        self._owe(chain, last, effort)
        for first in range(0, self.starts, self.wave):
            count = min(self.wave, self.starts - first)
            if first and chain.pool.left(chain.number) < count:
                break
            for node in (yield chain.ask([chain.first(first + i) for i in range(count)], 0, effort=effort)):
                state.see(node)
                best = better(best, node)
                if self.enough(node.score, state):
                    state.accepted = node.score
                    return (yield from chain.anew(node))
        assert best is not None
        state.accepted = best.score
        return (yield from chain.anew(best))

    def _effort(self, step: int, chain: Chain, memory: dict[str, float]) -> Effort:
        """Of a transition's candidates, with what they owe kept back: ends of trajectories are pictures and evaluated
        in full, and so is a candidate that has no rival, which would only be evaluated twice."""
        last = chain.sampler.transitions
        self._owe(chain, last - step)
        left = chain.pool.left(chain.number) + (1 if self.reserve else 0)
        if not chain.explore or step + 1 == last or left < 3 or not self.may_try(step, 1, left - 1, memory):
            return "full"
        self._owe(chain, last - step - 1, "exploring")
        return "exploring"

    def _width(self, step: int, tries: int, chain: Chain, memory: dict[str, float], effort: Effort) -> int:
        """How many candidates to try now: as many of a wave as may be tried one after the other."""
        # Of what the chain keeps back for itself, one evaluation is for this transition, or for its kept one anew.
        own = self.reserve and tries == 0 and effort == "full"
        left = chain.pool.left(chain.number) + (1 if own else 0)
        width = 0
        while width < self.wave and left - width >= 1 and self.may_try(step, tries + width, left - width, memory):
            width += 1
        return width

    def _owe(self, chain: Chain, transitions: int, effort: Effort = "full") -> None:
        """Keep back what finishing takes, and what is explored for an evaluation anew."""
        again = (effort == "exploring") + (bool(chain.explore) and self.previews)
        chain.pool.owed[chain.number] = (transitions if self.reserve else 0) + again

    def _good(self, node: Node, chain: Chain) -> bool:
        """Whether a finished picture is good enough: then all chains of the prompt are done."""
        if node.last and chain.pool.budget.met_by(node.score):
            chain.pool.done = True
        return chain.pool.done


@dataclass
class Threshold(StepPolicy):
    """Verifier-Threshold, our reconstruction.

    Attributes:
        tau: what a candidate has to exceed; a number is the same for all times. None takes what was measured for the
            verifier with this model, and where nothing was, the 0.8-quantile of the scores that the chain has seen.
        starts, wave, chains: see `StepPolicy` and `Policy`.
        init: "best" of all starts, or "threshold": the first start above tau, of so many at most.
        patience: tries of a transition at most; None: as many as the budget has.
        returns: "last", the best at the last time that was reached, or "best", the best of all previews.

    Raises:
        ValueError: a number out of range.
    """

    name: ClassVar[str] = "threshold"
    tau: Tau | float | None = None
    starts: int = 1
    wave: int = 1
    chains: int = 1
    init: Literal["best", "threshold"] = "best"
    patience: int | None = None
    returns: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        check_counts(self, "chains", "starts", "wave", *(() if self.patience is None else ("patience",)))
        tau = self.tau
        number = isinstance(tau, int | float) and not isinstance(tau, bool) and not math.isnan(tau)
        if not (tau is None or isinstance(tau, Tau) or number):
            raise ValueError(f"tau: {tau!r} is not allowed, needs a number, a threshold or None")
        if self.init not in ("best", "threshold"):
            raise ValueError(f"init: {self.init!r} is not allowed, needs best or threshold")
        if self.returns not in ("last", "best"):
            raise ValueError(f"returns: {self.returns!r} is not allowed, needs last or best")

    def may_try(self, step: int, tries: int, left: float, memory: dict[str, float]) -> bool:
        return self.patience is None or tries < self.patience

    @property
    def rule(self) -> Tau:
        """The threshold."""
        if self.tau is None:
            return OnlineQuantile(0.8)
        return self.tau if isinstance(self.tau, Tau) else Fixed(float(self.tau))

    @property
    def calibrated(self) -> bool:
        return self.tau is None

    def check_scores(self, verifier: Any) -> None:
        for score in self.rule.scores:
            if math.isfinite(score):  # with infinities one asks for all or nothing, and means it
                check_in_range("tau", score, verifier)

    def resolved(self, calibration: Calibration | None, times: Sequence[float], evaluations: float) -> Policy:
        if not self.calibrated or calibration is None:
            return self
        return replace(self, tau=calibration.threshold(times, evaluations / self.chains))

    def accept(self, step: int, score: float, before: float, state: _State) -> bool:
        return score > self.rule.at(step + 1, state.scores[:-1], state.accepted, before)

    def enough(self, score: float, state: _State) -> bool:
        before = state.scores[:-1]
        return self.init == "threshold" and score > self.rule.at(0, before, -math.inf, max(before, default=-math.inf))

    def end(self, best: Node, step_best: Node) -> Node:
        return best if self.returns == "best" else step_best

    @property
    def previews(self) -> bool:
        return self.returns == "best"

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

    def anew(self, transitions: int) -> int | None:
        return self.chains * transitions

    def check(self, budget: Budget, transitions: int, cost: int, exploring: bool = False) -> None:
        super().check(budget, transitions, cost, exploring)
        if self.quota is None and budget.max_nfe is None:
            raise ValueError("max_nfe: policy rbf needs it, or a quota")

    def remember(self, chain: Chain) -> dict[str, float]:
        limit, times = chain.pool.budget.max_nfe, chain.sampler.transitions + 1
        quota = self.quota
        if quota is None:
            assert limit is not None  # as `check` saw to
            once = self.starts + (chain.sampler.transitions if chain.explore else 0)
            quota = (limit // chain.pool.cost - once * self.chains) // (times * self.chains)
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

    def anew(self, transitions: int) -> int | None:
        return self.chains * transitions if self.candidates > 1 else 0

    def may_try(self, step: int, tries: int, left: float, memory: dict[str, float]) -> bool:
        return tries < self.candidates

    def accept(self, step: int, score: float, before: float, state: _State) -> bool:
        return False
