"""Policies: their unifying invariants, their costs, and RBF's trace against one computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_search import TIMES, Script, run_policy, sum_of

from fastgen.pipelines.search.engine import Chain, Node, SearchStopped
from fastgen.pipelines.search.names import POLICIES, named_policy
from fastgen.pipelines.search.policies import Rollover, Threshold, ValueSampling
from fastgen.pipelines.search.populations import Blockwise, MonteCarlo, SearchOverPaths
from fastgen.pipelines.search.starts import BestOfN, RandomSearch, ZeroOrder
from fastgen.pipelines.search.thresholds import BestSoFar, Fixed, OnlineQuantile, PreviousPlus, Scheduled, quantile


def trace(chain: Chain) -> list[tuple[int, int, float]]:
    return [(visit.parent, visit.index, visit.score) for visit in chain.trace]


def test_a_threshold_of_minus_infinity_is_a_plain_sample() -> None:
    (end,), (chain,), denoiser = run_policy(Threshold(-math.inf), max_nfe=40)
    latents = chain.first(0)
    for step in range(3):
        said = denoiser.predict(latents, torch.tensor([TIMES[step]]).double(), torch.zeros(1, dtype=torch.int64))
        latents = chain.sampler.step(latents, said, step, chain.noise(step, 0))
    assert torch.allclose(end.latents, latents) and end.last
    assert chain.tries == [(1, True)] * 3 and chain.pool.nfe == 4


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 999), quota=st.integers(1, 4), starts=st.integers(1, 3))
def test_best_so_far_with_a_quota_is_rbf(seed: int, quota: int, starts: int) -> None:
    """As far as the quota does not roll over, which it does not before the first acceptance; up to RBF's last step."""
    rival = Threshold(BestSoFar(), starts=starts, patience=quota)
    ours = run_policy(rival, max_nfe=200, seed=seed)[1][0]
    rbf = run_policy(Rollover(chains=1, starts=starts, quota=quota), max_nfe=200, seed=seed)[1][0]
    for (ours_tries, accepted), (theirs, also) in zip(ours.tries[:2], rbf.tries[:2], strict=True):
        assert (ours_tries, accepted) == (theirs, also)
        if accepted:
            break
    count = starts + ours.tries[0][0]
    assert trace(ours)[:count] == trace(rbf)[:count]


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 999), candidates=st.integers(1, 5))
def test_an_infinite_threshold_with_patience_is_svdd(seed: int, candidates: int) -> None:
    threshold = Threshold(math.inf, starts=candidates, patience=candidates)
    ours, (chain,), _ = run_policy(threshold, seed=seed)
    theirs, (other,), _ = run_policy(ValueSampling(chains=1, candidates=candidates), seed=seed)
    assert torch.allclose(ours[0].latents, theirs[0].latents, atol=1e-5)
    assert [v[:2] for v in trace(chain)] == [v[:2] for v in trace(other)]
    assert chain.pool.nfe == 4 * candidates


def test_starts_alone_are_best_of_n_on_previews() -> None:
    (end,), (chain,), denoiser = run_policy(Threshold(math.inf, starts=6), times=(1.0,), max_nfe=6)
    scores = []
    for number in range(6):
        said = denoiser.predict(chain.first(number), torch.ones(1).double(), torch.zeros(1, dtype=torch.int64))
        scores.append(float(sum_of(said.clean, ["x"])))
    assert end.score == pytest.approx(max(scores)) and end.number == scores.index(max(scores))


def test_rbf_follows_a_table_computed_by_hand() -> None:
    """One chain, two starts, 5 times, 17 evaluations: quota (17 - 2) // 5 = 3.

    Scores in turn, with the best so far behind the bar:
    starts 1, 4 | 4
    transition 0: 2, 5 > 4 accepted at try 2, one try rolls over: quota 4
    transition 1: 1, 3, 3, 2: forced with the first 3; quota back to 3
    transition 2: 6 > 5 accepted at try 1, quota 3 + 2 = 5
    transition 3, the last: takes what is left, 17 - 2 - 2 - 4 - 1 = 8, and never accepts.
    """
    scores = [1, 4, 2, 5, 1, 3, 3, 2, 6, 0, 7, 8, 1, 2, 8, 0, 0]
    policy = Rollover(chains=1, starts=2)
    (end,), (chain,), _ = run_policy(policy, (1.0, 0.8, 0.6, 0.4, 0.2), Script(scores), max_nfe=17)
    assert chain.tries == [(2, True), (4, False), (1, True), (8, False)]
    assert [visit.parent for visit in chain.trace] == [-1, -1, 1, 1, 3, 3, 3, 3, 5, *[8] * 8]
    assert end.number == 11 and end.score == 8  # the first of the two best
    assert chain.pool.nfe == 17


def test_rbf_runs_its_chains_in_lock_step_and_returns_the_best_preview_where_it_is_cut_short() -> None:
    policy = Rollover(chains=2, starts=1, quota=30)
    ends, chains, denoiser = run_policy(policy, TIMES, Script([9.0, 9.0] + [0.0] * 50), max_nfe=14)
    assert denoiser.rows[:7] == [2] * 7 and chains[0].pool.nfe == 14
    assert all(not end.last and end.score == 9 for end in ends)
    with pytest.raises(ValueError, match="max_nfe"):
        run_policy(Rollover(chains=2, starts=25), TIMES, max_nfe=57)
    with pytest.raises(ValueError, match="max_nfe"):
        run_policy(Rollover(), TIMES)


def test_scores_that_are_no_numbers_never_win() -> None:
    scores = [math.nan, 1.0, math.nan, math.inf, 0.5, math.nan, 0.7, 0.2, 0.1, 0.0, 0.3, 0.2]
    (end,), (chain,), _ = run_policy(ValueSampling(chains=1, candidates=3), TIMES, Script(scores))
    path = []
    node: Node | None = end
    while node is not None:
        path.insert(0, node.number)
        node = node.parent
    assert path == [1, 4, 6, 10] and end.score == pytest.approx(0.3)
    assert all(visit.score == -math.inf or math.isfinite(visit.score) for visit in chain.trace)


def test_ties_keep_the_earliest() -> None:
    (end,), _, _ = run_policy(ValueSampling(chains=1, candidates=4), TIMES, Script([0.5] * 16))
    assert end.number == 12 and end.parent is not None and end.parent.number == 8


COSTS = [
    (BestOfN(n=5), 5 * 4),
    (RandomSearch(rounds=3), 4 * (2**4 - 2)),
    (ZeroOrder(neighbours=3, rounds=2), 4 * 4 * 2),
    (MonteCarlo(particles=6), 6 * 4),
    (ValueSampling(chains=2, candidates=3), 2 * 3 * 4),
    (Blockwise(chains=2, candidates=3, block=2), 2 * 3 * 4),
    (SearchOverPaths(seeds=2, copies=3, steps=2), 2 * 2 + 2 * 2 * 3 * 4),
    (Threshold(-math.inf, starts=2, patience=9), 2 + 3),
]


@pytest.mark.parametrize(("policy", "cost"), COSTS, ids=[policy.name for policy, _ in COSTS])
@pytest.mark.parametrize("forwards", [1, 2])
def test_costs_are_those_of_the_table(policy: Any, cost: int, forwards: int) -> None:
    ends, chains, denoiser = run_policy(policy, TIMES, forwards=forwards)
    assert chains[0].pool.nfe == cost * forwards == sum(denoiser.rows) * forwards
    assert all(end.last and math.isfinite(end.score) for end in ends)
    best = max(visit.score for chain in chains for visit in chain.trace if visit.index == ends[0].index)
    assert max(end.score for end in ends) == pytest.approx(best)


RICH: list[Any] = [
    Threshold(0.4, wave=4, chains=2),
    Threshold(OnlineQuantile(0.8), wave=2, starts=3),
    Threshold(0.0, restarts=True, goal=1.5),
    Rollover(starts=3, wave=3),
    ValueSampling(candidates=4),
    Blockwise(candidates=4),
    MonteCarlo(particles=8),
    MonteCarlo(particles=8, temperature=1e-320, threshold=0.3),
    BestOfN(wave=3),
    RandomSearch(),
    ZeroOrder(neighbours=3),
    SearchOverPaths(copies=3, steps=2),
]


@pytest.mark.parametrize("policy", RICH, ids=[policy.description for policy in RICH])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 9999))
def test_the_best_finished_picture_is_returned(policy: Any, seed: int) -> None:
    ends, chains, _ = run_policy(policy, TIMES, max_nfe=150, seed=seed)
    last = max(visit.index for chain in chains for visit in chain.trace)
    best = max(visit.score for chain in chains for visit in chain.trace if visit.index == last)
    assert max(end.score for end in ends if end.last) == best


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(POLICIES)),
    budget=st.integers(4, 130),
    forwards=st.sampled_from([1, 2]),
    tau=st.sampled_from([-1.0, 1.0, 5.0]),
    wave=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_no_budget_is_exceeded(name: str, budget: int, forwards: int, tau: float, wave: int, seed: int) -> None:
    """Whatever is asked for ends inside the budget with a picture, or is refused before anything is evaluated."""
    arguments: dict[str, Any] = {
        "threshold": {"tau": tau, "wave": wave, "chains": 2, "starts": 3},
        "rbf": {"starts": 3, "wave": wave},
        "svdd": {"candidates": 3},
        "code": {"candidates": 3},
        "smc": {"particles": 5},
        "best-of-n": {"wave": wave},
        "zero-order": {"neighbours": 2},
        "search-over-paths": {"copies": 2, "steps": 2},
        "random": {},
    }
    policy = named_policy(name, **arguments[name])
    try:
        ends, chains, denoiser = run_policy(policy, TIMES, max_nfe=budget, forwards=forwards, seed=seed)
    except ValueError as error:
        assert "max_nfe" in str(error) and budget < policy.least(3) * forwards
        return
    assert chains[0].pool.nfe == sum(denoiser.rows) * forwards <= budget
    assert any(end.last for end in ends) or name == "rbf"
    if name == "threshold" and tau == 5.0:  # nothing is accepted: the pool is used up
        assert chains[0].pool.nfe > budget - forwards * wave


def test_waves_change_the_cost_and_may_find_a_better_end() -> None:
    kept, scores, costs = set(), [], set()
    for wave in (1, 2, 5):
        (end,), (chain,), _ = run_policy(
            Threshold(OnlineQuantile(0.8), wave=wave, starts=3), TIMES, max_nfe=300, seed=4
        )
        kept.add(tuple(chain.tries))
        scores.append(end.score)
        costs.add(chain.pool.nfe)
    assert len(kept) == 1 and len(costs) > 1 and min(scores) > scores[0] - 1e-5


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_prompt_does_not_depend_on_the_others_or_on_the_batch(name: str) -> None:
    policy = named_policy(name, **{"threshold": {"tau": 0.8}, "search-over-paths": {"steps": 4}}.get(name, {}))
    together = run_policy(policy, TIMES, max_nfe=240, prompts=3, batch_size=7)
    for prompt in range(3):
        alone = run_policy(policy, TIMES, max_nfe=240, prompts=3, batch_size=64)
        ours = [end for end, chain in zip(together[0], together[1], strict=True) if chain.prompt == prompt]
        theirs = [end for end, chain in zip(alone[0], alone[1], strict=True) if chain.prompt == prompt]
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one.latents, other.latents, atol=1e-4)


def test_several_prompts_share_forward_passes_and_leave_when_they_are_done() -> None:
    _, chains, denoiser = run_policy(Threshold(1.0), TIMES, max_nfe=60, prompts=3)
    assert denoiser.rows[0] == 3 and denoiser.rows[-1] < 3
    assert len({chain.pool.nfe for chain in chains}) > 1
    assert len(denoiser.rows) == max(chain.pool.nfe for chain in chains)


def test_a_target_ends_the_search_of_its_prompt() -> None:
    for policy in (BestOfN(wave=1), RandomSearch(), ZeroOrder(), SearchOverPaths(steps=2, copies=2)):
        _, (chain, *_), _ = run_policy(policy, TIMES, max_nfe=400)
        ends, (stopped, *_), _ = run_policy(policy, TIMES, max_nfe=400, target_score=0.2)
        assert stopped.pool.nfe < chain.pool.nfe
        assert max(end.score for end in ends) >= 0.2
    # Two chains, three tries a transition; at the first try of the last one a chain is there, and both stop.
    scores = [0.0] * 14 + [3.0] + [0.0] * 60
    ends, chains, _ = run_policy(Threshold(9.0, chains=2, patience=3), TIMES, Script(scores), target_score=2.0)
    assert ends[0].last and ends[0].score == 3.0 and chains[0].pool.nfe == 16


def test_thresholds() -> None:
    assert Fixed(0.5).at(3, [], 0.1, 0.2) == 0.5
    schedule = Scheduled((0.0, 1.0), times=5)
    assert [schedule.at(i, [], 0, 0) for i in range(5)] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert Scheduled((0.3,), times=4).at(2, [], 0, 0) == 0.3
    assert OnlineQuantile(0.5).at(1, [3.0, 1.0, 2.0], 0, 0) == 2.0
    assert OnlineQuantile(0.5).at(1, [], 0, 0) == -math.inf
    assert PreviousPlus(0.1).at(1, [], 0.4, 0.9) == pytest.approx(0.5)
    assert BestSoFar().at(1, [], 0.4, 0.9) == 0.9
    assert quantile([1, 2, 3, 4], 0.75) == 3 and quantile([1, 2, 3, 4], 0.0) == 1
    names = {tau.name for tau in (Fixed(0.5), schedule, OnlineQuantile(), PreviousPlus(), BestSoFar())}
    assert len(names) == 5
    assert Threshold(0.5).description == "threshold, tau fixed(0.5)"


def test_a_start_above_the_threshold_is_enough() -> None:
    (_,), (chain,), _ = run_policy(
        Threshold(2.0, starts=5, init="threshold"), TIMES, Script([1, 3, 9, 9, 9, 9, 9]), max_nfe=40
    )
    assert [visit.index for visit in chain.trace] == [0, 0, 1, 2, 3]


def test_zero_order_neighbours_keep_norm_and_cosine() -> None:
    from fastgen.pipelines.search.starts import neighbour

    pivot, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for cosine in (0.95, 0.0, -0.5):
        found = neighbour(pivot, noise, cosine)
        assert float(found.norm()) == pytest.approx(float(pivot.norm()))
        assert float((found * pivot).sum() / pivot.norm() ** 2) == pytest.approx(cosine)


@pytest.mark.parametrize("wrong", ["shape", "crash"])
def test_a_broken_verifier_loses_nothing(wrong: str) -> None:
    calls = []

    def verifier(pictures: Tensor, prompts: list[str]) -> Tensor:
        calls.append(len(pictures))
        if len(calls) < 3:
            return sum_of(pictures, prompts)
        if wrong == "crash":
            raise RuntimeError("no more")
        return torch.zeros(len(pictures), 2)

    with pytest.raises(SearchStopped, match="no more" if wrong == "crash" else "needs") as caught:
        run_policy(Threshold(-9.0), TIMES, verifier, max_nfe=40)
    assert isinstance(caught.value.__cause__, RuntimeError if wrong == "crash" else ValueError)


@pytest.mark.parametrize(
    ("name", "arguments", "word"),
    [
        ("threshold", {"starts": 0}, "starts"),
        ("threshold", {"patience": 0}, "patience"),
        ("threshold", {"returns": "first"}, "returns"),
        ("threshold", {"init": "all"}, "init"),
        ("threshold", {"colour": 1}, "colour"),
        ("rbf", {"quota": 0}, "quota"),
        ("svdd", {"candidates": 0}, "candidates"),
        ("smc", {"temperature": 0}, "temperature"),
        ("zero-order", {"cosine": 1.0}, "cosine"),
        ("search-over-paths", {"up": 0.9}, "up"),
        ("best-of-n", {"n": 0}, "n:"),
        ("better", {}, "better"),
    ],
)
def test_bad_settings(name: str, arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        named_policy(name, **arguments)


def test_searches_that_would_not_end_are_refused() -> None:
    for policy in (Threshold(0.5), BestOfN(), RandomSearch(), ZeroOrder()):
        with pytest.raises(ValueError, match="would not end"):
            run_policy(policy, TIMES)
