"""Thresholds from scored trajectories.

What is known: at each time of a trajectory K candidates were scored, the first of them was gone on with, and at the
end it is known how good the picture became (a checker's verdict, or its score). So the worth of a score at a time is
what pictures that came from such a score became, on average, and what trying once more brings there can be tried out:
candidates of one parent differ less than those of different prompts, and the later the less.

A threshold at a time then maximises (worth of what is gone on with) - price * (tries): one more try has to bring its
price. That is the reservation value of optimal stopping, measured instead of derived. One price for all times spends
evaluations where they bring most; low prices make thorough schedules, high ones sparing ones.
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
    "worths",
]

#: Fewest pictures for which a share of them is reported.
FEWEST = 16
#: P(correct) that the fixed threshold reaches.
LEVEL = 0.9
#: Standard deviations of what is wanted of a picture that an evaluation has to bring.
PRICES = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
#: What a decode and a verification cost, in evaluations.
LOOK = 1.0
#: Failures of a prompt for which looks are chosen one by one.
FAILURES = 4
QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_GRID = 65
_GROUPS = 20


def smallest_threshold(scores: np.ndarray, correct: np.ndarray, level: float = LEVEL) -> float | None:
    """The smallest tau with P(correct | score > tau) >= level; None where no tau above which `FEWEST` lie has it.

    Args:
        scores: [n], of final pictures.
        correct: bool [n].
    """
    order = np.argsort(scores, kind="stable")
    values, right = scores[order], correct[order].astype(np.float64)
    above = np.cumsum(right[::-1])[::-1]  # correct ones from each on
    for place in range(len(values) - FEWEST):
        first = int(np.searchsorted(values, values[place], side="right"))
        left = len(values) - first
        if left >= FEWEST and above[first] >= level * left:
            return float(values[place])
    return None


def precision_curve(scores: np.ndarray, correct: np.ndarray, taus: Sequence[float]) -> list[dict[str, Any]]:
    """At each tau: the share of pictures above it, how many of them are correct, and the standard error of that."""
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
    """Chances of a correct picture by time and score, and when to look; None where no picture is correct.

    Args:
        scores: [n, N, K] of n trajectories at N times; of K candidates the first was gone on with.
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
    """The times to look at after so many failures, chosen one after the other as long as a look saves something."""

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
    """Evaluations, and looks at `LOOK` each, that a correct picture costs if trajectories [n, N] without hope are
    given up, of prompts of which so many failed: there fewer trajectories succeed, but scores of those that do and of
    those that do not are the same."""
    chance = known.fresh(failures)
    weights = np.where(correct, chance / known.chance, (1 - chance) / max(1e-9, 1 - known.chance))
    cost, last = 0.0, scores.shape[1] - 1
    for time in range(last + 1):
        cost += weights.sum() * (1 + LOOK * (time in looks or time == last))
        if time in looks:
            weights = weights * [not known.hopeless(time, score, failures) for score in scores[:, time]]
    return float(cost / max(1e-9, weights[correct].sum()))


def worths(scores: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """Expected outcome given the score at a time: rises with it, fitted over groups of like scores.

    Args:
        scores: [n, K]; the outcomes are those of the first column.
        outcome: [n].

    Returns:
        [n, K].
    """
    return np.interp(scores, *_curve(scores[:, 0], outcome))


def _curve(scores: np.ndarray, outcome: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores that rise, and the outcomes expected of them."""
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
        lowest: a tau that everything exceeds; None: far below all scores.
    """
    if lowest is None:
        lowest = float(scores.min() - max(np.ptp(scores), 1.0))
    taus, tries = [], [1.0]
    for time in range(scores.shape[1]):
        tau, count = _best(price * float(outcome.std()), scores[:, time], worths(scores[:, time], outcome), lowest)
        taus.append(tau)
        if time:  # the picture begins with one start
            tries.append(count)
    return Schedule(price, tuple(taus), float(sum(tries)))


def _best(price: float, scores: np.ndarray, worth: np.ndarray, lowest: float) -> tuple[float, float]:
    """The tau at one time whose worth less the price of its tries is largest, and its tries."""
    grid = [lowest, *np.unique(np.quantile(scores, np.linspace(0, 1, _GRID)))]
    outcomes = [_try(tau, scores, worth) for tau in grid]
    best = int(np.argmax([gained - price * tries for gained, tries in outcomes]))  # of equal ones the lowest
    return float(grid[best]), outcomes[best][1]


def _try(tau: float, scores: np.ndarray, worth: np.ndarray) -> tuple[float, float]:
    """Mean worth and tries of the first candidate above tau, else the best, over all places to begin at."""
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
