"""Policies that search transition by transition: what they try, accept and go back for.

- `Threshold`: Verifier-Threshold (arXiv 2512.08985): the search continues with the first candidate above tau. The
  budget that is left pays for later transitions, and for another trajectory if the picture is not good enough.
- `Rollover`: RBF (arXiv 2503.19385): the first candidate above the best score so far, a quota for each transition, and
  what is left of it goes to the next.
- `ValueSampling`: SVDD-PM (arXiv 2408.08252): the best of K candidates at each transition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from fastgen.checks import check_bool, check_choice
from fastgen.errors import FastgenError
from fastgen.pipelines.search.budget import Budget
from fastgen.pipelines.search.calibration import Calibration
from fastgen.pipelines.search.engine import Chain, Node
from fastgen.pipelines.search.policy import Policy, check_counts
from fastgen.pipelines.search.prospects import Prospects
from fastgen.pipelines.search.steps import State, StepPolicy
from fastgen.pipelines.search.thresholds import BestSoFar, Fixed, OnlineQuantile, check_in_range, check_score
from fastgen.pipelines.search.thresholds import Threshold as Tau

__all__ = ["Rollover", "Threshold", "ValueSampling"]


@dataclass
class Threshold(StepPolicy):
    """Verifier-Threshold, our reconstruction.

    Attributes:
        tau: what a candidate has to exceed; a number is the same for all times. None takes what was measured for the
            verifier with this model, and where nothing was, the 0.8-quantile of the scores that the chain has seen.
        starts, wave, chains: see `StepPolicy` and `Policy`.
        init: "best" of all starts, or "threshold": the first start above tau, of `starts` at most.
        patience: tries of a transition at most; None: as many as the budget has.
        returns: "last", the best at the last time that was reached, or "best", the best of all previews.
        restarts: whether another trajectory is begun when one has ended and its picture scores no more than `goal`;
            the best picture of all is returned. None: where it was measured what
            becomes of trajectories.
        goal: see `restarts`; None takes the measured score of pictures that are correct with a chance of 0.9, and
            where nothing was measured the tau of the last time.
        prospects: with restarts, a trajectory is given up when a new one promises more; None takes what was measured.

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
    restarts: bool | None = None
    goal: float | None = None
    prospects: Prospects | None = None

    def __post_init__(self) -> None:
        check_counts(self, "chains", "starts", "wave", *(() if self.patience is None else ("patience",)))
        tau = self.tau
        if not (tau is None or isinstance(tau, Tau)):
            check_score("tau", tau)
        check_choice("init", self.init, ("best", "threshold"))
        check_choice("returns", self.returns, ("last", "best"))
        if self.goal is not None:
            check_score("goal", self.goal)
        if self.restarts is not None:
            check_bool("restarts", self.restarts)
        if not (self.prospects is None or isinstance(self.prospects, Prospects)):
            raise FastgenError(f"prospects: {self.prospects!r} is not allowed, needs a Prospects or None")

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
        goal = () if self.goal is None else (("goal", self.goal),)
        for name, score in (*(("tau", tau) for tau in self.rule.scores), *goal):
            if math.isfinite(score):  # with infinities one asks for all or nothing, and means it
                check_in_range(name, score, verifier)

    def resolved(self, calibration: Calibration | None, times: Sequence[float], evaluations: float) -> Policy:
        if not self.calibrated or calibration is None:
            return self
        prospects = calibration.prospects_at(times)
        if self.restarts is False or (self.restarts is None and prospects is None):
            return replace(self, tau=calibration.threshold(times, evaluations / self.chains))
        goal = calibration.goal if self.goal is None else self.goal
        return replace(self, tau=-math.inf, restarts=True, goal=goal, prospects=self.prospects or prospects)

    def accept(self, step: int, score: float, before: float, state: State) -> bool:
        return score > self.rule.at(step + 1, state.scores[:-1], state.accepted, before)

    def enough(self, score: float, state: State) -> bool:
        before = state.scores[:-1]
        return self.init == "threshold" and score > self.rule.at(0, before, -math.inf, max(before, default=-math.inf))

    def end(self, best: Node, step_best: Node) -> Node:
        return best if self.returns == "best" else step_best

    def again(self, end: Node, state: State) -> bool:
        if not self.restarts or state.chain.pool.done:
            return False
        goal = self.goal
        if goal is None:
            goal = self.rule.at(end.index, state.scores[:-1], state.accepted, -math.inf)
        state.chain.pool.done = end.score > goal or state.chain.meets(end)  # for the prompt's other chains as well
        return not state.chain.pool.done

    def looks(self, index: int, state: State) -> bool:
        known = self.prospects
        if not self.restarts or known is None or self.rule != Fixed(-math.inf):
            return True
        return known.looked_at(index, state.trajectory)

    def hopeless(self, node: Node, state: State) -> bool:
        if not self.restarts or self.prospects is None:
            return False
        return self.prospects.hopeless(node.index, node.score, state.trajectory)

    @property
    def endless(self) -> bool:
        return self.patience is None or bool(self.restarts)

    @property
    def description(self) -> str:
        if not self.restarts:
            return f"{self.name}, tau {self.rule.name}"
        goal = "the last tau" if self.goal is None else f"{self.goal:.3g}"
        given_up = "" if self.prospects is None else ", given up by measured chances"
        return f"{self.name}, tau {self.rule.name}{given_up}, anew until {goal}"


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
        times, quota = chain.sampler.transitions + 1, self.quota
        if quota is None:  # then there is a limit, as `check` saw to
            quota = int(chain.pool.limit - self.starts * self.chains) // (times * self.chains)
        return {"base": quota, "quota": quota, "last": chain.sampler.transitions - 1}

    def may_try(self, step: int, tries: int, left: float, memory: dict[str, float]) -> bool:
        if step == memory["last"]:
            return left < math.inf or tries < memory["quota"]
        return tries < memory["quota"]

    def accept(self, step: int, score: float, before: float, state: State) -> bool:
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

    def accept(self, step: int, score: float, before: float, state: State) -> bool:
        return False
