"""The budget of a search for a prompt, and the spent part."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from fastgen.checks import check_integer, check_number

__all__ = ["Budget", "Pool"]


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits in units that users think in; None: no limit.

    Attributes:
        max_nfe: forward passes of the model on one sample, for each prompt; with classifier-free guidance an
            evaluation takes two. Decoding and the verifier do not count.
        max_seconds: of the whole call; what is begun then is still finished.
        target_score: a prompt is done when a finished picture scores so much.

    Raises:
        ValueError: a number out of range.
    """

    max_nfe: int | None = None
    max_seconds: float | None = None
    target_score: float | None = None

    def __post_init__(self) -> None:
        if self.max_nfe is not None:
            check_integer("max_nfe", self.max_nfe, 1)
        if self.max_seconds is not None:
            check_number("max_seconds", self.max_seconds, above=0)
        if self.target_score is not None:
            check_number("target_score", self.target_score)

    def met_by(self, score: float) -> bool:
        """Whether a finished picture of that score ends the search."""
        return self.target_score is not None and score >= self.target_score


@dataclass
class Pool:
    """Evaluations of one prompt, shared by its chains.

    Attributes:
        budget: of the prompt.
        cost: forward passes of an evaluation.
        started: seconds, of `time.perf_counter`.
        spent: evaluations so far.
        owed: by chain, evaluations that it still needs to finish its trajectory: kept back from all others.
        done: a picture is good enough, no chain needs to continue.
        flops: of its evaluations and their pictures, where they are counted (`fastgen.accounting.count_flops`).
    """

    budget: Budget
    cost: int = 1
    started: float = field(default_factory=time.perf_counter)
    spent: int = 0
    owed: dict[int, int] = field(default_factory=dict)
    done: bool = False
    flops: float = 0.0

    @property
    def nfe(self) -> int:
        """Forward passes so far."""
        return self.spent * self.cost

    @property
    def limit(self) -> float:
        """Evaluations that the prompt may take; `inf` without a limit."""
        return math.inf if self.budget.max_nfe is None else self.budget.max_nfe // self.cost

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        limit = self.budget.max_seconds
        return limit is not None and time.perf_counter() - self.started >= limit

    def left(self, chain: int) -> float:
        """Evaluations that a chain may spend beyond what all chains, itself included, need to finish; `inf` without
        a limit, and none once the time is over."""
        if self.late or self.done:
            return 0
        return self.limit - self.spent - sum(self.owed.values())

    def affords_one(self) -> bool:
        """Whether the passes of an evaluation are there, whatever they are kept for and whatever the time is."""
        return self.spent + 1 <= self.limit

    def spend(self, count: int) -> None:
        """Count evaluations."""
        self.spent += count
