"""Verifier-Threshold with restarts: when, with which noise, what it returns and what it costs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toy_search import TIMES, Script, run_policy

from fastgen.pipelines.search.policies import Threshold
from fastgen.pipelines.search.prospects import Prospects
from fastgen.pipelines.search.thresholds import Fixed
from fastgen.training.threshold_rules import cost_of_correct, prospects

RISING = Prospects(0.5, ((0.0, 1.0),) * 4, ((0.0, 1.0),) * 4)  # a score is its own chance


def restarting(**changes: Any) -> Threshold:
    return Threshold(**{"tau": -math.inf, "restarts": True, "goal": 0.5, **changes})


def ends_with(*scores: float) -> Script:
    """Trajectories of four evaluations that end with these scores."""
    return Script([score for end in scores for score in (0.9, 0.9, 0.9, end)])


@pytest.mark.parametrize(
    ("max_nfe", "nfe", "score"),
    [(40, 12, 0.9), (12, 12, 0.9), (11, 8, 0.4), (7, 4, 0.3), (4, 4, 0.3)],
)
def test_trajectories_follow_until_one_is_good_enough(max_nfe: int, nfe: int, score: float) -> None:
    (end,), (chain,), _ = run_policy(restarting(), verifier=ends_with(0.3, 0.4, 0.9, 1.0), max_nfe=max_nfe)
    assert (chain.pool.nfe, end.score, end.last) == (nfe, pytest.approx(score), True)
    assert chain.tries == [(1, True)] * (nfe // 4 * 3)


def test_the_best_end_is_returned_and_not_the_last_or_a_preview() -> None:
    (end,), (chain,), _ = run_policy(restarting(goal=2.0), verifier=ends_with(0.3, 0.4, 0.2), max_nfe=12)
    assert end.score == pytest.approx(0.4) and end.number == 7 and chain.pool.nfe == 12


def test_without_a_goal_the_last_threshold_is_it() -> None:
    """A picture above the tau of the last time ends the search; patience ends the tries of a transition."""
    policy = Threshold(0.5, restarts=True, patience=2)
    scores = Script([0.9, 0.9, 0.9, 0.1, 0.2, 0.9, 0.9, 0.9, 0.6])
    (end,), (chain,), _ = run_policy(policy, verifier=scores, max_nfe=40)
    assert chain.tries == [(1, True), (1, True), (2, False), (1, True), (1, True), (1, True)]
    assert end.number == 8 and chain.pool.nfe == 9


def test_a_trajectory_has_noise_of_its_own() -> None:
    (end,), (chain,), denoiser = run_policy(restarting(), verifier=ends_with(0.3, 0.9), max_nfe=40)
    latents = chain.first(1)
    assert not torch.equal(latents, chain.first(0))
    for step in range(3):
        said = denoiser.predict(latents, torch.tensor([TIMES[step]]).double(), torch.zeros(1, dtype=torch.int64))
        assert not torch.equal(chain.noise(step, 0, 1), chain.noise(step, 0))
        latents = chain.sampler.step(latents, said, step, chain.noise(step, 0, 1))
    assert torch.allclose(end.latents, latents)


def test_one_chain_that_is_good_enough_ends_the_others() -> None:
    """In lock-step, two rows each time; the first chain had restarted before it knew of the second one's picture."""
    scores = Script([0.9, 0.9] * 3 + [0.2, 0.7])
    ends, chains, denoiser = run_policy(restarting(chains=2), verifier=scores, max_nfe=80)
    assert denoiser.rows == [2] * 4 + [1] and chains[0].pool.done
    assert [end.score for end in ends] == [pytest.approx(0.2), pytest.approx(0.7)]


def test_what_promises_less_than_a_new_one_is_given_up() -> None:
    """By hand: at time 1 two evaluations are left of four. Going on pays where p * 4 >= 0.5 * 2, p >= 0.25. After one
    failure q is 1 / 3 and the odds of every score are half as large; continuing pays where p * 4 >= 2 / 3, p >= 1 / 6,
    odds of 1 / 5, which were 2 / 5: a score of 2 / 7."""
    policy = restarting(prospects=RISING)
    scores = [0.9, 0.24, 0.9, 0.29, 0.9, 0.9]
    (end,), (chain,), _ = run_policy(policy, verifier=Script(scores), max_nfe=40)
    assert [visit.index for visit in chain.trace] == [0, 1, 0, 1, 2, 3] and end.number == 5
    scores[3] = 0.28
    assert len(run_policy(policy, verifier=Script(scores), max_nfe=40)[1][0].trace) > 6
    # The budget pays for no other one: this one continues.
    scores = [0.9, 0.1, 0.1, 0.3, 0.9, 0.9, 0.9, 0.9]
    (end,), (chain,), _ = run_policy(policy, verifier=Script(scores), max_nfe=5)
    assert chain.pool.nfe == 4 and end.last and end.score == pytest.approx(0.3)
    (end,), (chain,), _ = run_policy(policy, verifier=Script(scores), max_nfe=6)
    assert [visit.index for visit in chain.trace] == [0, 1, 0, 1, 2, 3]


def test_chances() -> None:
    assert [RISING.fresh(k) for k in range(3)] == pytest.approx([1 / 2, 1 / 3, 1 / 4])
    # The law of which that is the mean: Beta(1, 1 / chance - 1), updated by k failures.
    draws = torch.distributions.Beta(1.0, 1.0).sample((400_000,))
    for k in range(3):
        weight = (1 - draws) ** k
        assert float((draws * weight).sum() / weight.sum()) == pytest.approx(RISING.fresh(k), abs=3e-3)
    assert RISING.of(2, 0.3) == pytest.approx(0.3) and RISING.of(0, -5.0) == 0 and RISING.of(0, 5.0, 3) == 1
    assert RISING.of(2, 0.5, 2) == pytest.approx(RISING.fresh(2))  # a score that tells nothing leaves the prompt's
    assert not RISING.hopeless(3, 0.0, 0)  # nothing is left to pay
    far = RISING.at([0, 3])
    assert len(far.scores) == 2 and far.hopeless(0, 0.2, 0) and not far.hopeless(0, 0.3, 0)
    bad: tuple[Any, ...]
    for bad in (
        (0.0, ((0.0,),), ((0.0,),)),
        (1.5, ((0.0,),), ((0.0,),)),
        (0.5, (), ()),
        (0.5, ((0, 1.0),), ((0.0,),)),
    ):
        with pytest.raises(ValueError, match="chance|scores"):
            Prospects(*bad)


def test_what_is_good_enough() -> None:
    steep = Prospects(0.5, ((0.0, 1.0), (0.0, 0.5, 1.0)), ((0.0, 1.0), (0.2, 0.6, 1.0)))
    assert steep.good(0.6) == pytest.approx(0.5) and steep.good(0.8) == pytest.approx(0.75)
    assert steep.good(0.1) == 0.0
    weak = replace(steep, chances=((0.0, 1.0), (0.2, 0.4, 0.5)))
    assert weak.good(0.9) == pytest.approx(0.75)  # 0.9 of what there is at best
    flat = replace(steep, chances=((0.0, 1.0), (0.4, 0.4, 0.4)))
    assert flat.good(0.9) == 0.0


def test_only_times_that_may_change_something_are_checked() -> None:
    """No look in the first trajectory, one at time 1 in those after a failure, and at every end."""
    careful = replace(RISING, looks=((), (1,)))
    policy = restarting(prospects=careful)
    (end,), (chain,), _ = run_policy(policy, verifier=Script([0.2, 0.1, 0.9, 0.7]), max_nfe=40)
    seen = [(visit.index, None if math.isnan(visit.score) else round(visit.score, 3)) for visit in chain.trace]
    first = [(0, None), (1, None), (2, None), (3, 0.2)]
    assert seen == [*first, (0, None), (1, 0.1), (0, None), (1, 0.9), (2, None), (3, 0.7)]
    assert end.score == pytest.approx(0.7) and chain.pool.nfe == 10
    # Looks change what is known, not what is drawn.
    everything = run_policy(replace(policy, prospects=None), verifier=Script([0.9] * 4), max_nfe=40)[0][0]
    alone = run_policy(policy, verifier=Script([0.9]), max_nfe=40)[0][0]
    assert torch.equal(everything.latents, alone.latents)
    # A threshold that something may miss is a look at every time.
    strict = replace(policy, tau=Fixed(0.5), patience=2)
    (end,), (chain,), _ = run_policy(strict, verifier=Script([0.8, 0.7, 0.1, 0.6, 0.9]), max_nfe=40)
    assert [visit.index for visit in chain.trace] == [0, 1, 2, 2, 3] and end.score == pytest.approx(0.9)


def test_looks_are_taken_where_they_save_most() -> None:
    """Outcomes are clear from time 2 of 6 on: one look there, because a second one would add nothing."""
    rng = np.random.default_rng(1)
    correct = rng.random(3000) < 0.3
    scores = rng.random((3000, 6, 1))
    scores[:, 2:, 0] = np.where(correct, 0.9, 0.1)[:, None] + 0.05 * rng.random((3000, 4))
    found = prospects(scores, correct)
    assert found is not None and found.looks == ((2,),) * 4
    # All go three evaluations and a look far, three in ten to the end and the look there.
    share = correct.mean()
    for failures in range(3):
        q = 1 / (1 / share + failures)
        costs = [cost_of_correct(found, scores[..., 0], correct, failures, looks) for looks in ((2,), ())]
        assert costs == pytest.approx([(4 + q * 4) / q, 7 / q])
    hidden = prospects(rng.random((3000, 6, 1)), correct)  # nothing tells before the end
    assert hidden is not None and hidden.looks == ((),) * 4
    often = prospects(scores, rng.random(3000) < 0.999)  # hardly one fails: a look costs more than it saves
    assert often is not None and often.looks is not None and often.looks[0] == ()
    assert found.at([0, 0, 2, 2, 5]).looks == ((2,),) * 4


@settings(deadline=None, max_examples=60)
@given(
    scores=st.lists(st.floats(0, 1), max_size=60),
    max_nfe=st.integers(6, 60),
    goal=st.floats(0, 1),
    tau=st.floats(0, 1),
    patience=st.integers(1, 3),
    chains=st.integers(1, 2),
    wave=st.integers(1, 3),
    starts=st.integers(1, 2),
    careful=st.booleans(),
)
@example([0.0] * 6 + [0.5, 1.0], 8, 0.0, 0.0, 2, 1, 2, 2, False)
def test_the_budget_holds_and_a_finished_picture_is_returned(
    scores: list[float],
    max_nfe: int,
    goal: float,
    tau: float,
    patience: int,
    chains: int,
    wave: int,
    starts: int,
    careful: bool,
) -> None:
    policy = Threshold(
        tau,
        restarts=True,
        goal=goal,
        patience=patience,
        chains=chains,
        wave=wave,
        starts=starts,
        prospects=RISING if careful else None,
    )
    budget = max(max_nfe, policy.least(3))
    ends, found, _ = run_policy(policy, verifier=Script(scores), max_nfe=budget)
    assert found[0].pool.nfe <= budget
    best = max(ends, key=lambda end: (end.last, end.score))
    assert best.last
    finished = [visit for chain in found for visit in chain.trace if visit.index == 3]
    assert best.score == max(visit.score for visit in finished)


def test_prospects_of_trajectories() -> None:
    """Scores that tell more the later: the chance rises with the score, at the last time from 0 to 1."""
    rng = np.random.default_rng(0)
    outcome = rng.random(4000) < 0.4
    scores = np.stack([rng.random(4000), outcome * 0.3 + 0.7 * rng.random(4000), outcome * 1.0], axis=1)[..., None]
    found = prospects(scores, outcome)
    assert found is not None and found.chance == pytest.approx(outcome.mean())
    assert abs(found.of(0, 0.1) - 0.4) < 0.1 and abs(found.of(0, 0.9) - 0.4) < 0.1
    assert found.of(1, 0.1) < 0.02 and found.of(1, 0.95) > 0.98 and 0.3 < found.of(1, 0.5) < 0.5
    assert (found.of(2, 0.0), found.of(2, 1.0)) == (0.0, 1.0)
    assert all(list(row) == sorted(row) for row in found.chances)
    assert prospects(scores, np.zeros(4000, dtype=bool)) is None
