"""Agreement of scores with verdicts, against pairs counted one by one and on pictures that were rendered."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.evaluation.verifiers.agreement import agreement, auroc


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
def test_auroc_counts_pairs_with_ties_half(pairs: list[tuple[int, bool]]) -> None:
    scores, correct = np.array([score for score, _ in pairs]), np.array([right for _, right in pairs])
    counted = [(a > b) + 0.5 * (a == b) for a in scores[correct] for b in scores[~correct]]
    found = auroc(scores, correct)
    assert found is None if not counted else found == pytest.approx(np.mean(counted))


def test_numbers_by_task() -> None:
    found = agreement([0.9, 0.2, 0.6, 0.05], [True, False, False, False], ["a", "a", "b", "b"], probabilities=True)
    assert (found["n"], found["correct"], found["auroc"], found["accuracy"]) == (4, 0.25, 1.0, 0.75)
    assert found["brier"] == pytest.approx((0.01 + 0.04 + 0.36 + 0.0025) / 4)
    assert found["calibration_error"] == pytest.approx((0.1 + 0.2 + 0.6 + 0.05) / 4)
    assert found["tasks"]["a"]["auroc"] == 1.0 and found["tasks"]["b"]["auroc"] is None
    assert "brier" not in agreement([3.0, 4.0], [True, False]) and agreement([], [])["auroc"] is None


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (([0.1], [True, False]), "need as many"),
        (([0.1], [True], ["a", "b"]), "need as many"),
        (([float("nan")], [True]), "no number"),
    ],
)
def test_bad_input_is_refused(arguments: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        agreement(*arguments)
