"""Rollover budget forcing against an oracle of its rules that knows scores only (arXiv 2503.19385)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from toy_search import Script, run_policy

from fastgen.pipelines.search.policies import Rollover


@dataclass
class Walk:
    """One chain of the oracle."""

    step: int = 0
    tries: int = 0
    quota: int = 0
    best: float = -math.inf
    done: list[tuple[int, bool]] = field(default_factory=list)
    times: list[int] = field(default_factory=list)

    def advance(self, accepted: bool, quota: int) -> None:
        self.done.append((self.tries, accepted))
        self.step, self.tries, self.quota = self.step + 1, 0, quota


def oracle(scores: Sequence[float], chains: int, starts: int, count: int, budget: int) -> list[Walk]:
    """Walks of all chains over `count` times.

    A try that beats the best score so far continues, and the rest of its quota rolls over; a quota that is spent
    continues with the best of its tries and rolls nothing over; the last transition takes all that is left.
    """
    quota = (budget - starts * chains) // (count * chains)
    remaining, walks = iter(scores), [Walk(quota=quota) for _ in range(chains)]
    for walk in walks:
        walk.best = max(next(remaining) for _ in range(starts))
        walk.times += [0] * starts
    spent = starts * chains
    while spent + chains <= budget:
        for walk in walks:
            score, spent = next(remaining), spent + 1
            walk.tries += 1
            walk.times.append(walk.step + 1)
            beats, walk.best = score > walk.best, max(walk.best, score)
            if walk.step == count - 2:
                continue
            if beats:
                walk.advance(True, quota + walk.quota - walk.tries)
            elif walk.tries >= walk.quota:
                walk.advance(False, quota)
    return walks


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_proposals_and_scores_are_those_of_the_rules(data: st.DataObject) -> None:
    chains, starts = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 1)]))
    count, spare = data.draw(st.integers(3, 5)), data.draw(st.integers(0, 12))
    budget = chains * (starts + count * data.draw(st.integers(1, 3))) + spare * chains
    # Few values, so that ties are common.
    scores = data.draw(st.lists(st.integers(0, 6), min_size=budget, max_size=budget))
    times = [1 - place / count for place in range(count)]
    _, made, _ = run_policy(
        Rollover(chains=chains, starts=starts),
        times,
        verifier=Script([float(score) for score in scores]),
        max_nfe=budget,
    )
    for chain, walk in zip(made, oracle(scores, chains, starts, count, budget), strict=True):
        assert [visit.index for visit in chain.trace] == walk.times
        assert chain.tries[: len(walk.done)] == walk.done
        assert max(visit.score for visit in chain.trace) == walk.best
