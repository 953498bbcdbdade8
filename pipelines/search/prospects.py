"""What becomes of a trajectory, given the verifier's score of a preview: whether to go on with it or begin another.

A search that may begin anew has a second choice beside trying a transition again. Going on from a preview costs the
evaluations that are left of the trajectory and succeeds with a chance p; a new one costs a whole trajectory and
succeeds with a chance p_0. A trajectory is worth its cost as long as p / left >= p_0 / whole. How likely a new one is
to succeed depends on the prompt, and every failure tells that it is a hard one: after k of them the chance is taken
as 1 / (1 / p_0 + k), the posterior mean of a Beta(1, 1 / p_0 - 1) law of the prompts' chances.

A look at a preview costs a decode and a verification, often more than an evaluation, so there are few of them: at the
times at which they save most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

__all__ = ["Prospects"]


@dataclass(frozen=True)
class Prospects:
    """Measured by `fastgen train search-calibrate`.

    Attributes:
        chance: p_0, the share of all trajectories that ended in a correct picture.
        scores: for each time, scores that rise.
        chances: of a correct picture from a preview of such a score; between the scores interpolated.
        looks: times at which a trajectory is looked at before its end; None: at all of them.
        lowest: a tau that every score exceeds; None: there is none.

    Raises:
        ValueError: a chance outside (0, 1], or lengths that do not fit.
    """

    chance: float
    scores: tuple[tuple[float, ...], ...]
    chances: tuple[tuple[float, ...], ...]
    looks: tuple[int, ...] | None = None
    lowest: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.chance <= 1:
            raise ValueError(f"chance: {self.chance} is not allowed, needs a number in (0, 1]")
        lengths = [(len(scores), len(chances)) for scores, chances in zip(self.scores, self.chances, strict=True)]
        if not lengths or any(one != other or not one for one, other in lengths):
            raise ValueError("scores, chances: need as many numbers each, and at least one time")

    def at(self, places: list[int]) -> Prospects:
        """Those of other times, which stand nearest to ours at `places`."""
        scores, chances = (tuple(row[place] for place in places) for row in (self.scores, self.chances))
        looks = self.looks
        if looks is not None:
            # Where several times stand nearest to the same one of ours, one look is enough.
            looks = tuple(i for i, place in enumerate(places) if place in looks and place not in places[:i])
        return replace(self, scores=scores, chances=chances, looks=looks)

    def of(self, index: int, score: float) -> float:
        """The chance of a trajectory whose preview at a time scores so much."""
        return float(np.interp(score, self.scores[index], self.chances[index]))

    def fresh(self, failures: int) -> float:
        """The chance of a new trajectory of a prompt of which so many failed."""
        return 1 / (1 / self.chance + failures)

    def looked_at(self, index: int) -> bool:
        """Whether a trajectory is looked at at a time."""
        return self.looks is None or index in self.looks or index == len(self.scores) - 1

    def hopeless(self, index: int, score: float, failures: int) -> bool:
        """Whether a new trajectory promises more for its cost than going on from time `index`."""
        whole = len(self.scores)
        left = whole - 1 - index
        return self.of(index, score) * whole < self.fresh(failures) * left
