"""Thresholds of Verifier-Threshold search (arXiv 2512.08985; its update rule is not published, so these are ours).

A threshold is the score that a candidate must exceed for the search to continue with it. Every result has to name it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastgen.checks import check_integer, check_number
from fastgen.errors import FastgenError

__all__ = [
    "BestSoFar",
    "Fixed",
    "OnlineQuantile",
    "PreviousPlus",
    "Scheduled",
    "Threshold",
    "check_in_range",
    "check_score",
    "quantile",
]


def check_in_range(name: str, value: float, verifier: Any) -> float:
    """A score, when the verifier can give one above or below it.

    Args:
        name: of the argument.
        value: of it.
        verifier: may declare `range`, the least and the largest score there can be.

    Raises:
        ValueError: no number, or outside the range.
    """
    if math.isnan(value):
        raise ValueError(f"{name}: {value} is no number")
    bounds = getattr(verifier, "range", None)
    if bounds is not None and not bounds[0] <= value <= bounds[1]:
        label = getattr(verifier, "name", "") or type(verifier).__name__
        raise ValueError(
            f"{name}: {value:g} is outside the scores of {label}, which are {bounds[0]:g} to {bounds[1]:g}"
        )
    return float(value)


def check_score(name: str, value: object) -> float:
    """A score to compare with: a number, infinities included, which ask for all or nothing.

    Raises:
        FastgenError: it is not a number.
    """
    if isinstance(value, float) and math.isinf(value):
        return value
    return check_number(name, value)


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least a share q of them does not exceed; -inf of none."""
    if not values:
        return -math.inf
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


class Threshold(ABC):
    """tau at each time of a trajectory."""

    @abstractmethod
    def at(self, index: int, scores: Sequence[float], accepted: float, best: float) -> float:
        """The score to exceed.

        Args:
            index: of the time that the candidate is at.
            scores: all scores of this chain so far.
            accepted: score of the node that the candidate is proposed from; -inf at the start.
            best: the best score of this chain so far.
        """

    @property
    @abstractmethod
    def name(self) -> str:
        """For the report, with its numbers."""

    @property
    def scores(self) -> tuple[float, ...]:
        """The numbers in it that are scores of a verifier."""
        return ()


@dataclass(frozen=True)
class Fixed(Threshold):
    """The same for all times."""

    tau: float

    def __post_init__(self) -> None:
        check_score("tau", self.tau)

    def at(self, index: int, scores: Sequence[float], accepted: float, best: float) -> float:
        return self.tau

    @property
    def name(self) -> str:
        return f"fixed({self.tau:g})"

    @property
    def scores(self) -> tuple[float, ...]:
        return (self.tau,)


@dataclass(frozen=True)
class Scheduled(Threshold):
    """One for each time, as `fastgen train search-calibrate` measures them: early previews score lower.

    Attributes:
        taus: for shares of the trajectory, evenly spaced from its first to its last time; between them
            interpolated.
        times: of the trajectory.
        source: what they were measured for.

    Raises:
        ValueError: no tau, or no time.
    """

    taus: tuple[float, ...]
    times: int
    source: str = ""

    def __post_init__(self) -> None:
        check_integer("times", self.times, 1)
        if not isinstance(self.taus, list | tuple) or not self.taus:
            raise FastgenError(f"taus: {self.taus!r} is not allowed, needs a tuple of at least one")
        for tau in self.taus:
            check_score("taus", tau)

    def at(self, index: int, scores: Sequence[float], accepted: float, best: float) -> float:
        if len(self.taus) == 1 or self.times == 1:
            return self.taus[-1]
        place = index / (self.times - 1) * (len(self.taus) - 1)
        low = min(int(place), len(self.taus) - 2)
        share = place - low
        return (1 - share) * self.taus[low] + share * self.taus[low + 1]

    @property
    def name(self) -> str:
        source = f"; {self.source}" if self.source else ""
        return f"schedule({', '.join(f'{tau:.3g}' for tau in self.taus)}{source})"

    @property
    def scores(self) -> tuple[float, ...]:
        return self.taus


@dataclass(frozen=True)
class OnlineQuantile(Threshold):
    """The q-quantile of all scores of this chain so far; the starts seed it."""

    q: float = 0.8

    def __post_init__(self) -> None:
        check_number("q", self.q, 0, 1)

    def at(self, index: int, scores: Sequence[float], accepted: float, best: float) -> float:
        return quantile(scores, self.q)

    @property
    def name(self) -> str:
        return f"online-quantile({self.q:g})"


@dataclass(frozen=True)
class PreviousPlus(Threshold):
    """The accepted score of the step before, and delta."""

    delta: float = 0.0

    def __post_init__(self) -> None:
        check_number("delta", self.delta)

    def at(self, index: int, scores: Sequence[float], accepted: float, best: float) -> float:
        return accepted + self.delta

    @property
    def name(self) -> str:
        return f"previous{self.delta:+g}"


@dataclass(frozen=True)
class BestSoFar(Threshold):
    """The best score of the chain: what rollover budget forcing asks."""

    def at(self, index: int, scores: Sequence[float], accepted: float, best: float) -> float:
        return best

    @property
    def name(self) -> str:
        return "best-so-far"
