"""Thresholds from scores: against brute force, and on trajectories whose best thresholds are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.training.threshold_rules import (
    FEWEST,
    expected_outcomes,
    precision_curve,
    quantile_rows,
    schedule_at,
    smallest_threshold,
)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), n=st.integers(FEWEST, 80), levels=st.integers(2, 40), share=st.floats(0.3, 0.95))
def test_the_smallest_threshold_is_that_of_a_search_over_all(seed: int, n: int, levels: int, share: float) -> None:
    """With ties: few different scores."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, n) / levels
    correct = rng.random(n) < share + (1 - share) * scores
    found = smallest_threshold(scores, correct)
    fitting = [
        tau
        for tau in np.unique(scores)
        if (scores > tau).sum() >= FEWEST and correct[scores > tau].mean() >= 0.9 - 1e-12
    ]
    assert found == (float(fitting[0]) if fitting else None)


def test_a_curve_of_precision() -> None:
    scores, correct = np.array([0.1, 0.4, 0.6, 0.9]), np.array([False, True, False, True])
    rows = precision_curve(scores, correct, [0.0, 0.5, 0.9])
    assert [row["n"] for row in rows] == [4, 2, 0] and [row["above"] for row in rows] == [1.0, 0.5, 0.0]
    assert [row["correct"] for row in rows] == [0.5, 0.5, None] and rows[2]["stderr"] is None
    assert rows[1]["stderr"] == pytest.approx((0.25 / 2) ** 0.5)


def test_the_worth_of_a_score_is_what_came_of_it() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((4000, 3))
    correct = (rng.random(4000) < scores[:, 0] ** 2).astype(float)
    found = expected_outcomes(scores, correct)
    assert np.abs(found - scores**2).mean() < 0.04 and found.min() >= 0 and found.max() <= 1
    flat = np.argsort(scores.ravel())
    assert (np.diff(found.ravel()[flat]) >= -1e-12).all()
    assert np.allclose(
        expected_outcomes(scores, -correct).mean(), -correct.mean(), atol=0.02
    )  # what does not rise is flat


def trajectories(n: int = 1500, branches: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Three times: scores that say nothing, scores of which a retry changes much, and scores that the parent fixes."""
    rng = np.random.default_rng(1)
    noise, free = rng.random((n, branches)), rng.random((n, branches))
    fixed = np.repeat(free[:, :1], branches, axis=1)
    outcome = (rng.random(n) < free[:, 0]).astype(float)
    return np.stack([noise, free, fixed], axis=1), outcome


def test_retries_go_where_they_bring_something() -> None:
    scores, outcome = trajectories()
    found = schedule_at(0.1, scores, outcome, lowest=0.0)
    silent, telling, late = found.taus
    assert silent < 0.1 and late == 0.0
    # E[(V - v)+] of uniform outcomes, (1 - v)^2 / 2, is the price, 0.1 standard deviations of 0.5, at v = 0.68.
    assert 0.55 < telling < 0.8
    assert 2.2 < found.evaluations < 4.5


def test_a_lower_price_makes_a_schedule_more_thorough() -> None:
    scores, outcome = trajectories()
    found = [schedule_at(price, scores, outcome) for price in (9.0, 0.3, 0.1, 0.0)]
    counts = [schedule.evaluations for schedule in found]
    assert counts == sorted(counts) and counts[0] == 3.0 and counts[-1] > counts[1]
    assert max(found[0].taus) < scores.min()  # everything is accepted, lower scores than were seen as well


def test_tries_are_counted_as_a_search_makes_them() -> None:
    """One trajectory, one transition, tau between: by hand over the three places to begin at."""
    from fastgen.training.threshold_rules import _try

    scores, worth = np.array([[0.2, 0.9, 0.4]]), np.array([[2.0, 9.0, 4.0]])
    assert _try(0.5, scores, worth) == pytest.approx((9.0, (2 + 1 + 3) / 3))
    assert _try(0.3, scores, worth) == pytest.approx(((9 + 9 + 4) / 3, (2 + 1 + 1) / 3))
    assert _try(0.9, scores, worth) == pytest.approx((9.0, 3.0))  # none is above: all are tried, the best is taken


def test_quantiles_are_those_of_all_candidates() -> None:
    scores = np.arange(24.0).reshape(4, 2, 3)
    rows = quantile_rows(scores)
    assert set(rows) == {"0.5", "0.6", "0.7", "0.8", "0.9", "0.95"}
    assert rows["0.5"] == pytest.approx([np.median(scores[:, 0]), np.median(scores[:, 1])])
