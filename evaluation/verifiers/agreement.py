"""How well a verifier's scores predict which pictures a checker finds correct.

A search can only be as good as that: AUROC is the chance that a correct picture scores above a wrong one; where scores
are probabilities, the expected calibration error and the Brier score say whether they mean what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

__all__ = ["agreement", "auroc", "calibration_error"]

BINS = 10


def auroc(scores: np.ndarray, correct: np.ndarray) -> float | None:
    """P(score of a correct one > score of a wrong one), ties counted half; None where all are alike.

    Args:
        scores: float [n].
        correct: bool [n].
    """
    right = int(correct.sum())
    wrong = len(correct) - right
    if not right or not wrong:
        return None
    ranks = rankdata(scores)
    return float((ranks[correct].sum() - right * (right + 1) / 2) / (right * wrong))


def calibration_error(scored: Sequence[tuple[float, bool]], bins: int = 15) -> float | None:
    """Expected calibration error of (score, correct) pairs; None without any."""
    if not scored:
        return None
    scores, correct = (np.array(column, dtype=np.float64) for column in zip(*scored, strict=True))
    place = np.minimum((scores * bins).astype(int), bins - 1)
    sizes = np.bincount(place, minlength=bins)
    gaps = np.bincount(place, correct - scores, minlength=bins)  # size * (share correct - mean score)
    return float(np.abs(gaps).sum() / sizes.sum())


def agreement(
    scores: Sequence[float], correct: Sequence[bool], tags: Sequence[str] = (), probabilities: bool = False
) -> dict[str, Any]:
    """Agreement of scores with verdicts, JSON-ready.

    Args:
        scores: [n].
        correct: [n].
        tags: task of each picture; none: no numbers by task.
        probabilities: scores are in [0, 1] and are to mean P(correct).

    Returns:
        n, correct (share), auroc, and with `probabilities` brier, calibration_error (over ten bins) and accuracy (of
        score > 0.5 as a verdict); under "tasks" the same of each task.

    Raises:
        ValueError: not as many of one as of the other, or a score that is no number.
    """
    values, right = np.asarray(scores, dtype=np.float64), np.asarray(correct, dtype=bool)
    if values.shape != right.shape or values.ndim != 1 or len(tags) not in (0, len(values)):
        raise ValueError(f"scores, correct, tags: got {len(values)}, {len(right)} and {len(tags)}, need as many")
    if np.isnan(values).any():
        raise ValueError("scores: one is no number")
    found: dict[str, Any] = _numbers(values, right, probabilities)
    if tags:
        which = np.asarray(tags)
        names = list(dict.fromkeys(tags))
        found["tasks"] = {name: _numbers(values[which == name], right[which == name], probabilities) for name in names}
    return found


def _numbers(scores: np.ndarray, correct: np.ndarray, probabilities: bool) -> dict[str, Any]:
    n = len(scores)
    found: dict[str, Any] = {"n": n, "correct": float(correct.mean()) if n else None, "auroc": auroc(scores, correct)}
    if probabilities and n:
        found["accuracy"] = float(((scores > 0.5) == correct).mean())
        found["brier"] = float(np.square(scores - correct).mean())
        found["calibration_error"] = calibration_error(list(zip(scores, correct, strict=True)), BINS)
    return found
