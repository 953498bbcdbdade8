"""Thresholds from scored trajectories.

At each time of a trajectory K candidates were scored and the first one continued; the outcome of the final picture is
known (a checker's verdict, or its score). The value of a score at a time is the mean outcome of pictures with such a
score. The gain of another try can be measured as well: candidates of one parent differ less than those of different
prompts, and less at later times.

A threshold at a time maximises (value of the chosen candidate) - price * (tries): another try must gain its price.
That is the reservation value of optimal stopping, measured instead of derived. One price for all times spends
evaluations where they gain most; low prices give thorough schedules, high ones cheap schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from fastgen.pipelines.search.calibration import Schedule
from fastgen.pipelines.search.prospects import Prospects

__all__ = [
    "FEWEST",
    "LEVEL",
    "LOOK",
    "PRICES",
    "cost_of_correct",
    "precision_curve",
    "prospects",
    "quantile_rows",
    "schedule_at",
    "smallest_threshold",
    "expected_outcomes",
]

#: Fewest pictures for which a share of them is reported.
FEWEST = 16
#: P(correct) of the fixed threshold.
LEVEL = 0.9
#: Minimum gain of an evaluation, in standard deviations of the outcome.
PRICES = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
#: Cost of a decode and a verification, in evaluations.
LOOK = 1.0
#: Numbers of failures of a prompt for which check times are chosen separately.
FAILURES = 4
QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_GRID = 65
_GROUPS = 20


def smallest_threshold(scores: np.ndarray, correct: np.ndarray, level: float = LEVEL) -> float | None:
    """The smallest tau with P(correct | score > tau) >= level; None if no tau with `FEWEST` scores above it has it.

    Args:
        scores: [n], of final pictures.
        correct: bool [n].
    """
    order = np.argsort(scores, kind="stable")
    values, right = scores[order], correct[order].astype(np.float64)
    above = np.cumsum(right[::-1])[::-1]  # number of correct ones from each score on
    for place in range(len(values) - FEWEST):
        first = int(np.searchsorted(values, values[place], side="right"))
        left = len(values) - first
        if left >= FEWEST and above[first] >= level * left:
            return float(values[place])
    return None


def precision_curve(scores: np.ndarray, correct: np.ndarray, taus: Sequence[float]) -> list[dict[str, Any]]:
    """At each tau: the share of pictures above it, the share of those that are correct, and its standard error."""
    rows = []
    for tau in taus:
        above = scores > tau
        n = int(above.sum())
        share = float(correct[above].mean()) if n else None
        stderr = None if share is None else float(np.sqrt(share * (1 - share) / n))
        rows.append({"tau": float(tau), "above": n / len(scores), "n": n, "correct": share, "stderr": stderr})
    return rows


def quantile_rows(scores: np.ndarray) -> dict[str, tuple[float, ...]]:
    """Quantiles of the scores [n, N, K] at each of N times, by q."""
    rows = np.quantile(scores.swapaxes(0, 1).reshape(scores.shape[1], -1), QUANTILES, axis=1)
    return {f"{q:g}": tuple(map(float, row)) for q, row in zip(QUANTILES, rows, strict=True)}


def prospects(scores: np.ndarray, correct: np.ndarray) -> Prospects | None:
    """Probabilities of a correct picture by time and score, and check times; None if no picture is correct.

    Args:
        scores: [n, N, K] of n trajectories at N times; the first of K candidates continued.
        correct: bool [n].
    """
    if not correct.any():
        return None
    rows = [_curve(scores[:, time, 0], correct.astype(np.float64)) for time in range(scores.shape[1])]
    places, chances = (tuple(tuple(map(float, row[i])) for row in rows) for i in range(2))
    found = Prospects(float(correct.mean()), places, chances, ((),))
    looks = tuple(_looks(found, scores[..., 0], correct, failures) for failures in range(FAILURES))
    return replace(found, looks=looks)


def _looks(known: Prospects, scores: np.ndarray, correct: np.ndarray, failures: int) -> tuple[int, ...]:
    """The check times after `failures` failures, added greedily while a check saves cost."""

    def cost(looks: tuple[int, ...]) -> float:
        return cost_of_correct(known, scores, correct, failures, looks)

    chosen: tuple[int, ...] = ()
    while True:
        left = [time for time in range(scores.shape[1] - 1) if time not in chosen]
        best = min(left, key=lambda time: cost((*chosen, time)), default=None)
        if best is None or cost((*chosen, best)) >= cost(chosen):
            return tuple(sorted(chosen))
        chosen += (best,)


def cost_of_correct(
    known: Prospects, scores: np.ndarray, correct: np.ndarray, failures: int, looks: Sequence[int]
) -> float:
    """Cost of a correct picture in evaluations, plus `LOOK` per check, if hopeless trajectories [n, N] are dropped,
    for prompts with this number of failures: fewer of their trajectories succeed, but the scores of successful and of
    failed ones have the same distributions."""
    chance = known.fresh(failures)
    weights = np.where(correct, chance / known.chance, (1 - chance) / max(1e-9, 1 - known.chance))
    cost, last = 0.0, scores.shape[1] - 1
    for time in range(last + 1):
        cost += weights.sum() * (1 + LOOK * (time in looks or time == last))
        if time in looks:
            weights = weights * [not known.hopeless(time, score, failures) for score in scores[:, time]]
    return float(cost / max(1e-9, weights[correct].sum()))


def expected_outcomes(scores: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """Expected outcome given the score at a time: a non-decreasing fit over groups of similar scores.

    Args:
        scores: [n, K]; the outcomes are those of the first column.
        outcome: [n].

    Returns:
        [n, K].
    """
    return np.interp(scores, *_curve(scores[:, 0], outcome))


def _curve(scores: np.ndarray, outcome: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Increasing scores and their expected outcomes."""
    order = np.argsort(scores, kind="stable")
    groups = np.array_split(order, min(_GROUPS, max(1, len(order) // FEWEST)))
    places = np.array([scores[group].mean() for group in groups])
    sizes = np.array([len(group) for group in groups], dtype=np.float64)
    return places, isotonic_regression([outcome[group].mean() for group in groups], weights=sizes).x


def schedule_at(price: float, scores: np.ndarray, outcome: np.ndarray, lowest: float | None = None) -> Schedule:
    """The schedule of a price.

    Args:
        price: see `Schedule`.
        scores: [n, N, K] of n trajectories at N times, K candidates each.
        outcome: [n].
        lowest: a tau below all scores; None chooses one.
    """
    if lowest is None:
        lowest = float(scores.min() - max(np.ptp(scores), 1.0))
    taus, tries = [], [1.0]
    for time in range(scores.shape[1]):
        tau, count = _best(
            price * float(outcome.std()), scores[:, time], expected_outcomes(scores[:, time], outcome), lowest
        )
        taus.append(tau)
        if time:  # the first time has one candidate
            tries.append(count)
    return Schedule(price, tuple(taus), float(sum(tries)))


def _best(price: float, scores: np.ndarray, worth: np.ndarray, lowest: float) -> tuple[float, float]:
    """The tau at one time with the largest value minus price of its tries, and its tries."""
    grid = [lowest, *np.unique(np.quantile(scores, np.linspace(0, 1, _GRID)))]
    outcomes = [_try(tau, scores, worth) for tau in grid]
    best = int(np.argmax([gained - price * tries for gained, tries in outcomes]))  # the lowest of equal ones
    return float(grid[best]), outcomes[best][1]


def _try(tau: float, scores: np.ndarray, worth: np.ndarray) -> tuple[float, float]:
    """Mean value and tries of the first candidate above tau, else the best one, over all cyclic orders."""
    rows, count = np.arange(len(scores)), scores.shape[1]
    gained, tries = 0.0, 0.0
    for shift in range(count):
        now, here = np.roll(scores, shift, axis=1), np.roll(worth, shift, axis=1)
        above = now > tau
        found = above.any(axis=1)
        chosen = np.where(found, above.argmax(axis=1), now.argmax(axis=1))
        gained += float(here[rows, chosen].mean())
        tries += float(np.where(found, chosen + 1, count).mean())
    return gained / count, tries / count
