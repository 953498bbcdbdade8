"""Statistics of `fastgen bench search`: everything is by prompt, and the prompts of all rows are the same.

The score is the mean of the task means. Pictures of one prompt succeed and fail together, so the prompt is the unit of
every interval and test: bootstraps redraw prompts within each task, the same ones for all rows, and the permutation
test flips the sign of a prompt's difference. Of n prompts of a task n - 1 are drawn: n would give a variance too small
by (n - 1) / n, which matters for a handful (Rao and Wu 1988). With a single prompt a task there is no telling how
prompts of a task differ, and the draws are over all tasks, which is too wide rather than too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import permutation_test

__all__ = ["Outcomes", "Resampling", "compare", "diversity", "mixture", "reach", "reach_cost"]

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Outcomes:
    """Results of a policy for every prompt at one budget, each the mean over the seeds.

    Attributes:
        correct: [prompts], share of pictures that the checker finds correct.
        seconds: [prompts] of a search.
        nfe: [prompts], forward passes of a search.
    """

    correct: Values
    seconds: Values
    nfe: Values


def mixture(first: Outcomes, second: Outcomes, share: float) -> Outcomes:
    """What is expected of a policy that takes the budget of `first` for a share of all searches, chosen at random, and
    that of `second` for the others."""
    pairs = zip((first.correct, first.seconds, first.nfe), (second.correct, second.seconds, second.nfe), strict=True)
    return Outcomes(*(share * a + (1 - share) * b for a, b in pairs))


class Resampling:
    """Means over prompts in which every task counts the same, and bootstraps of them.

    Args:
        tags: the task of each prompt.
        draws: of the bootstrap.
        seed: of the random numbers.
    """

    def __init__(self, tags: Sequence[str], draws: int = 4000, seed: int = 0) -> None:
        self.seed = seed
        names = np.array(tags)
        self.places = [np.flatnonzero(names == tag) for tag in dict.fromkeys(tags)]
        self.weights: Values = np.zeros(len(names))
        for place in self.places:
            self.weights[place] = 1 / (len(self.places) * len(place))
        rng = np.random.default_rng(seed)
        alone = min(map(len, self.places)) == 1
        groups = [np.arange(len(names))] if alone else self.places
        self.drawn = [rng.choice(group, (draws, max(1, len(group) - 1))) for group in groups]

    def mean(self, values: Values) -> float:
        """Of the values [prompts]."""
        return float(np.mean([values[place].mean() for place in self.places]))

    def means(self, values: Values) -> Values:
        """Of every draw: [draws]."""
        return np.mean([values[rows].mean(axis=1) for rows in self.drawn], axis=0)

    def interval(self, values: Values) -> list[float]:
        """95 % of the means."""
        return _middle(self.means(values))


def _middle(values: Values) -> list[float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return [float(low), float(high)]


def compare(ours: Outcomes, theirs: Outcomes, by: Resampling) -> dict[str, Any]:
    """Paired by prompt: the difference of the scores, its interval, and p of the one-sided permutation test that ours
    is no better (sign flips; exact where there are few prompts)."""
    difference = ours.correct - theirs.correct
    test = permutation_test(
        (difference * by.weights,),
        np.sum,
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=9999,
        random_state=np.random.default_rng(by.seed),
    )
    return {"difference": by.mean(difference), "ci": by.interval(difference), "p": float(test.pvalue)}


def reach_cost(costs: Sequence[float], scores: Sequence[float], target: float) -> float:
    """The least cost at which the line through the points (cost, score) is as high as `target`; inf: nowhere."""
    points = sorted(zip(costs, scores, strict=True))
    before: tuple[float, float] | None = None
    for cost, score in points:
        if score >= target:
            if before is None:
                return cost
            share = (target - before[1]) / (score - before[1])
            return before[0] + share * (cost - before[0])
        before = cost, score
    return float("inf")


def reach(curve: Sequence[Outcomes], rival: Outcomes, cost: str, by: Resampling) -> dict[str, Any]:
    """Cost of a policy for a rival's score, on the line through its own budgets.

    Args:
        curve: the policy at its budgets.
        rival: the other one at one budget.
        cost: "seconds" or "nfe".
        by: the prompts.

    Returns:
        "cost" (None where the score is not reached), "rival_cost", "ratio" (how many times cheaper; 0 where it is not
        reached), "bound" (the smallest budget scores as much already: the ratio is a lower bound), "ci" of the ratio,
        and "reached": the share of draws in which the score is.
    """
    ours = [(getattr(point, cost), point.correct) for point in curve]
    paid = reach_cost([by.mean(a) for a, _ in ours], [by.mean(b) for _, b in ours], by.mean(rival.correct))
    theirs = getattr(rival, cost)
    drawn = [(by.means(a), by.means(b)) for a, b in ours]
    targets, prices = by.means(rival.correct), by.means(theirs)
    ratios = np.array(
        [
            prices[i] / reach_cost([a[i] for a, _ in drawn], [b[i] for _, b in drawn], targets[i])
            for i in range(len(targets))
        ]
    )
    return {
        "cost": None if np.isinf(paid) else paid,
        "rival_cost": by.mean(theirs),
        "ratio": by.mean(theirs) / paid,
        "bound": paid == min(by.mean(a) for a, _ in ours),
        "ci": _middle(ratios),
        "reached": float((ratios > 0).mean()),
    }


def diversity(features: NDArray[Any], by: Resampling) -> float | None:
    """Mean distance of two pictures of a prompt.

    Args:
        features: [prompts, seeds, d]; None is the answer where there is one seed.
        by: the prompts.
    """
    first, second = np.triu_indices(features.shape[1], k=1)
    if not len(first):
        return None
    distances = np.linalg.norm(features[:, first] - features[:, second], axis=-1)
    return by.mean(distances.mean(axis=1))
