"""Expected results of a trajectory by the verifier's score of a preview: continue it or begin another.

Going on from a preview costs the evaluations that are left of the trajectory and succeeds with a chance p; a new one
costs a whole trajectory and succeeds with a chance q. A trajectory is worth its cost as long as p / left >= q / whole:
that is the threshold of its score.

How likely a new one is to succeed depends on the prompt, and every failure is evidence of a hard one. After k of
them q = 1 / (1 / q_0 + k), the posterior mean of a Beta(1, 1 / q_0 - 1) law of the prompts' chances, and what a score
says is weighed with it: p / (1 - p) = L q / (1 - q), with the likelihood ratio L of the score from all prompts
together.

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
        chance: q_0, the share of all trajectories that ended in a correct picture.
        scores: for each time, scores that rise.
        chances: of a correct picture from a preview of such a score; between the scores interpolated.
        looks: after 0, 1, 2, … failures the times at which a trajectory is looked at before its end, the last entry
            for all further ones; None: all times.

    Raises:
        ValueError: a chance outside (0, 1], or lengths that do not fit.
    """

    chance: float
    scores: tuple[tuple[float, ...], ...]
    chances: tuple[tuple[float, ...], ...]
    looks: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.chance <= 1:
            raise ValueError(f"chance: {self.chance} is not allowed, needs a number in (0, 1]")
        lengths = [(len(scores), len(chances)) for scores, chances in zip(self.scores, self.chances, strict=True)]
        if not lengths or any(one != other or not one for one, other in lengths):
            raise ValueError("scores, chances: need as many numbers each, and at least one time")

    def at(self, places: list[int]) -> Prospects:
        """Those of the nearest other times at `places`."""
        scores, chances = (tuple(row[place] for place in places) for row in (self.scores, self.chances))
        looks = self.looks
        if looks is not None:
            # Where several times are nearest to the same one of ours, one look is enough.
            firsts = {place: i for i, place in reversed(list(enumerate(places)))}
            looks = tuple(tuple(firsts[time] for time in row if time in firsts) for row in looks)
        return replace(self, scores=scores, chances=chances, looks=looks)

    def fresh(self, failures: int) -> float:
        """q, the chance of a new trajectory of a prompt after this many failures."""
        return 1 / (1 / self.chance + failures)

    def of(self, index: int, score: float, failures: int = 0) -> float:
        """p, the chance of a trajectory whose preview at a time has this score, after this many failures of its
        prompt."""
        p = float(np.interp(score, self.scores[index], self.chances[index]))
        q, before = self.fresh(failures), self.chance
        if not failures or p in (0, 1) or before == 1:
            return p
        odds = p / (1 - p) * (q / (1 - q)) / (before / (1 - before))
        return odds / (1 + odds)

    def looked_at(self, index: int, failures: int) -> bool:
        """Whether a trajectory is looked at at a time before its end."""
        return self.looks is None or index in self.looks[min(failures, len(self.looks) - 1)]

    def hopeless(self, index: int, score: float, failures: int) -> bool:
        """Whether a new trajectory promises more for its cost than continuing from time `index`."""
        whole = len(self.scores)
        left = whole - 1 - index
        return self.of(index, score, failures) * whole < self.fresh(failures) * left

    def good(self, level: float) -> float:
        """The score of a picture that is correct with a chance of `level`, or where none is, of `level` times the
        largest chance."""
        scores, chances = self.scores[-1], self.chances[-1]
        wanted = level if chances[-1] >= level else level * chances[-1]
        place = next(i for i, chance in enumerate(chances) if chance >= wanted)
        if place == 0 or chances[place] == chances[place - 1]:
            return scores[place]
        share = (wanted - chances[place - 1]) / (chances[place] - chances[place - 1])
        return scores[place - 1] + share * (scores[place] - scores[place - 1])
