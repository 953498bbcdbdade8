"""Exploring: candidates at one effort, what is kept at another; budgets hold, and what cannot explore says so."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_search import TIMES, Script, ToyDenoiser, run_policy, sum_of

from fastgen.accounting import account, count_flops
from fastgen.pipelines.loading import load_pipeline
from fastgen.pipelines.noise_search import NoiseSearchPipeline, SearchInterrupted
from fastgen.pipelines.search.engine import Chain, Node
from fastgen.pipelines.search.names import named_policy
from fastgen.pipelines.search.policies import Rollover, Threshold, ValueSampling
from fastgen.pipelines.search.policy import Policy
from fastgen.pipelines.search.report import report_of
from fastgen.pipelines.search.starts import BestOfN, RandomSearch, ZeroOrder
from fastgen.pipelines.search.thresholds import OnlineQuantile

CHEAP = {"bias": 0.3}
STEP_POLICIES: list[Policy] = [
    Threshold(OnlineQuantile(0.8), starts=3),
    Threshold(OnlineQuantile(0.8), wave=3, chains=2, init="threshold", starts=4),
    Threshold(math.inf, patience=3, returns="best"),
    Rollover(chains=2, starts=2),
    ValueSampling(chains=2, candidates=3),
]
START_POLICIES: list[Policy] = [BestOfN(wave=3), RandomSearch(), ZeroOrder(neighbours=2)]


def way(node: Node | None) -> list[Node]:
    """From the start to it."""
    found: list[Node] = []
    while node is not None:
        found.insert(0, node)
        node = node.parent
    return found


def in_full(node: Node, denoiser: ToyDenoiser) -> bool:
    """Whether its prediction is that of full effort; not counted."""
    counted = list(denoiser.rows)
    times = torch.tensor([node.sampler.times[node.index]]).double()
    said = denoiser.predict(node.latents, times, torch.zeros(1, dtype=torch.int64))
    denoiser.rows = counted
    return torch.allclose(said.clean, node.prediction.clean, atol=1e-6)


@pytest.mark.parametrize("policy", STEP_POLICIES, ids=lambda policy: policy.name)
def test_what_the_search_continues_with_is_evaluated_in_full(policy: Policy) -> None:
    ends, chains, denoiser = run_policy(policy, max_nfe=90, explore=CHEAP)
    explored = sum(visit.effort == "exploring" for chain in chains for visit in chain.trace)
    assert explored == sum(denoiser.cheap) > 0 and denoiser.effort == {}
    assert {time for time, bias in denoiser.asked if bias} <= set(TIMES[:-1])
    for end in ends:
        nodes = way(end)
        assert [node.index for node in nodes] == list(range(len(nodes)))
        assert all(in_full(node, denoiser) for node in nodes)
        for before, after in zip(nodes, nodes[1:], strict=False):
            proposals = [before.step(chain.noise(before.index, i)) for chain in chains for i in range(60)]
            assert any(torch.equal(after.latents, proposal) for proposal in proposals)
    report = report_of("", policy, chains, ends[0], 0, "finished", 0.0)
    assert report.explored == explored and not report.draft
    assert report.starts == sum(visit.parent < 0 for chain in chains for visit in chain.trace) - sum(
        visit.effort == "anew" and visit.index == 0 for chain in chains for visit in chain.trace
    )
    assert chains[0].pool.nfe == sum(denoiser.rows) <= 90


@pytest.mark.parametrize("policy", [*STEP_POLICIES, *START_POLICIES], ids=lambda policy: policy.name)
@pytest.mark.parametrize("forwards", [1, 2])
def test_budgets_hold_and_the_picture_is_a_full_one(policy: Policy, forwards: int) -> None:
    transitions = len(TIMES) - 1
    least = policy.least(transitions) + (policy.anew(transitions) or 0)
    for more in (0, 1, 2, 3, 5, 11, 40):
        ends, chains, denoiser = run_policy(
            policy, max_nfe=(least + more) * forwards, forwards=forwards, explore=CHEAP
        )
        assert chains[0].pool.nfe == forwards * sum(denoiser.rows) <= (least + more) * forwards
        assert all(not end.explored and in_full(end, denoiser) for end in ends)
        assert all(math.isfinite(end.score) for end in ends)
        assert any(end.last for end in ends) or getattr(policy, "previews", False)
    with pytest.raises(ValueError, match="max_nfe"):
        run_policy(policy, max_nfe=least * forwards - 1, forwards=forwards, explore=CHEAP)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), budget=st.integers(12, 70), quota=st.integers(1, 9), chains=st.integers(1, 3))
def test_a_search_without_a_reserve_ends_with_a_full_one_too(seed: int, budget: int, quota: int, chains: int) -> None:
    policy = Rollover(chains=chains, starts=1, quota=quota)
    budget = max(budget, policy.least(3) + (policy.anew(3) or 0))
    ends, (first, *_), denoiser = run_policy(policy, max_nfe=budget, seed=seed, explore=CHEAP)
    assert first.pool.spent == sum(denoiser.rows) <= budget
    assert all(in_full(end, denoiser) for end in ends)


def test_no_knobs_are_no_exploring() -> None:
    for policy in (*STEP_POLICIES, *START_POLICIES):
        plain = run_policy(policy, max_nfe=80)
        empty = run_policy(policy, max_nfe=80, explore={})
        for one, other in zip(plain[1], empty[1], strict=True):
            assert repr(one.trace) == repr(other.trace)  # scores that were not taken are NaN, which equals nothing
        assert plain[2].rows == empty[2].rows and not empty[2].cheap


def test_an_effort_of_no_effect_finds_the_same() -> None:
    """Exploring with what full effort does costs evaluations, and changes nothing else."""
    policy = ValueSampling(chains=1, candidates=3)
    (plain,), (chain,), _ = run_policy(policy)
    (end,), (other,), _ = run_policy(policy, explore={"bias": 1e-30})
    assert torch.equal(plain.latents, end.latents) and plain.score == end.score
    assert other.pool.spent == chain.pool.spent + 3 and other.tries == chain.tries


@pytest.mark.parametrize("policy", [Threshold(OnlineQuantile(0.8), starts=2), Rollover(chains=2, starts=2)])
def test_chains_at_different_efforts_share_a_round(policy: Policy) -> None:
    """Prompts do not depend on each other, and no forward pass has two efforts."""
    together = run_policy(policy, max_nfe=60, prompts=3, batch_size=5, explore=CHEAP)
    wide = run_policy(policy, max_nfe=60, prompts=3, batch_size=64, explore=CHEAP)
    for one, other in zip(together[1], wide[1], strict=True):
        assert [v[:3] for v in rows(one)] == [v[:3] for v in rows(other)]
    rounds = len(wide[2].rows)
    assert max(len(chain.trace) for chain in wide[1]) < rounds  # some rounds took two forward passes


def rows(chain: Chain) -> list[tuple[int, int, str, float]]:
    return [(visit.parent, visit.index, visit.effort, visit.score) for visit in chain.trace]


def test_a_single_candidate_is_not_evaluated_twice() -> None:
    for policy, budget in ((Threshold(math.inf, patience=1), 40), (Threshold(math.inf), 4), (Threshold(math.inf), 5)):
        _, (chain,), denoiser = run_policy(policy, max_nfe=budget, explore=CHEAP)
        assert not denoiser.cheap and {visit.effort for visit in chain.trace} == {"full"}
    (end,), (chain,), denoiser = run_policy(ValueSampling(1, 4), times=(1.0,), explore=CHEAP)
    assert not denoiser.cheap and end.last and len(chain.trace) == 4  # all starts are ends


def test_of_whole_pictures_the_best_draft_is_drawn_again() -> None:
    scores = [0.1, 0.9, 0.3, 0.2, 0.5]
    (end,), (chain,), denoiser = run_policy(BestOfN(n=4, wave=3), verifier=Script(scores), explore=CHEAP)
    assert chain.pool.nfe == 5 * 4 and sum(denoiser.cheap) == 4 * 4
    assert torch.equal(way(end)[0].latents, chain.first(1)) and end.score == pytest.approx(0.5)
    (alone,), _, _ = run_policy(BestOfN(n=2, wave=1), verifier=Script([0.0, 1.0]))
    assert torch.allclose(end.latents, alone.latents)
    report = report_of("", BestOfN(), [chain], end, 0, "finished", 0.0)
    assert report.starts == 4 and report.explored == 16 and len(report.path) == 4


def test_a_draft_that_only_seems_good_enough_does_not_end_the_search() -> None:
    # Two drafts; the second seems good and is not; the third is, and is.
    scores = [0.1, 0.9, 0.4, 0.95, 0.8]
    (end,), (chain,), _ = run_policy(
        BestOfN(wave=1), verifier=Script(scores), max_nfe=400, target_score=0.7, explore=CHEAP
    )
    assert end.score == pytest.approx(0.8) and chain.pool.nfe == 5 * 4
    # The budget ends before a better one is found: the best full one is returned.
    (end,), (chain,), _ = run_policy(
        BestOfN(wave=1), verifier=Script(scores), max_nfe=12, target_score=0.7, explore=CHEAP
    )
    assert end.score == pytest.approx(0.4) and chain.pool.nfe == 12


def test_the_best_of_all_previews_is_returned_in_full_however_the_budget_ends() -> None:
    """The best preview is an explored candidate that was not gone on with."""
    scores = [0.0, 0.3, 0.9, *[0.1] * 60]
    for budget in (9, 12, 20):
        (end,), (chain,), denoiser = run_policy(
            Threshold(0.2, returns="best"), TIMES, Script(scores[:2] + scores[3:]), max_nfe=budget, explore=CHEAP
        )
        assert end.index == 1 and in_full(end, denoiser) and chain.pool.spent == sum(denoiser.rows) <= budget
        assert torch.equal(end.latents, way(end)[0].step(chain.noise(0, 0)))
        assert end.number == len(chain.trace) - 1  # evaluated anew once more, and scored


def test_the_quota_of_rbf_leaves_what_repeated_evaluations_take() -> None:
    times = [1 - i / 12 for i in range(12)]
    falling = [-float(i) for i in range(100)]
    for budget in range(25, 60):
        (end,), (chain,), _ = run_policy(
            Rollover(chains=1, starts=2), times, Script(falling), max_nfe=budget, explore=CHEAP
        )
        assert end.last and chain.pool.spent <= budget


@pytest.mark.parametrize("name", ["smc", "code", "search-over-paths"])
def test_populations_cannot_explore(name: str) -> None:
    with pytest.raises(ValueError, match=f"explore: policy {name}"):
        run_policy(named_policy(name), max_nfe=4000, explore=CHEAP)


# ---- with a model ----

CALL: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
    "guidance_scale": 2.0,
    "output_type": "pt",
}
EXPLORE = {"tail_drop": 0.9, "uncond_tail_drop": 0.95}


@pytest.fixture(scope="module")
def dc(micro_dc: Path) -> Any:
    pipe = load_pipeline(str(micro_dc), dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    means = images.float().mean(dim=(2, 3))
    return (means[:, 0] - means[:, 1:].mean(dim=1)) / 255


@pytest.mark.parametrize("policy", [ValueSampling(chains=1, candidates=3), BestOfN(n=3)], ids=["svdd", "best-of-n"])
def test_dynamic_chunking_explores_for_fewer_flops(dc: Any, policy: Policy) -> None:
    search = NoiseSearchPipeline(dc, redness, policy)
    seeded = [torch.Generator().manual_seed(1)]
    with account(), count_flops():
        full = search("a red heart", generator=seeded, **CALL)
        cheap = search("a red heart", generator=[torch.Generator().manual_seed(1)], explore=EXPLORE, **CALL)
    report = cheap.reports[0]
    assert report.finished and not report.draft and report.nfe == 2 * report.evaluations
    assert report.explored == (6 if policy.name == "svdd" else 9)
    assert report.evaluations == full.reports[0].evaluations + (2 if policy.name == "svdd" else 3)
    assert {"explore", "denoise"} <= set(cheap.stats.seconds) and "explore" not in full.stats.seconds
    assert cheap.stats.paths["explore"] == {"tail_drop 0.9, uncond_tail_drop 0.95": None}
    (plain,) = full.reports
    assert report.flops and plain.flops
    assert report.flops / report.evaluations < 0.95 * plain.flops / plain.evaluations
    assert report.flops <= cheap.stats.flops
    assert dc.transformer._budget is None


def test_without_a_counter_there_are_no_flops(dc: Any) -> None:
    output = NoiseSearchPipeline(dc, redness, BestOfN(n=1))("a heart", **CALL)
    assert output.reports[0].flops is None and not output.stats.flops_counted and output.reports[0].explored == 0


def test_an_interruption_shows_the_full_one(dc: Any) -> None:
    """Of drafts alone it can show only a draft, and says so."""
    for policy, calls, draft in ((ValueSampling(chains=1, candidates=2), 1, False), (BestOfN(n=3, wave=1), 2, True)):
        asked: list[int] = []

        def verifier(images: Tensor, prompts: list[str], asked: list[int] = asked, calls: int = calls) -> Tensor:
            asked.append(len(images))
            if len(asked) > calls:
                raise RuntimeError("no more")
            return redness(images, prompts)

        with pytest.raises(SearchInterrupted) as caught:
            NoiseSearchPipeline(dc, verifier, policy)("a heart", explore=EXPLORE, **CALL)
        output = caught.value.output
        assert output is not None and output.reports[0].draft is draft and float(output.images.std()) > 0.02


@pytest.mark.parametrize(
    ("explore", "word"),
    [
        ({"tail_drop": 1.5}, "explore: tail_drop"),
        ({"colour": 1}, "explore: colour"),
        ("tail_drop", "explore: 'tail_drop'"),
        ({"tail_drop": 0.5, "token_budget": 3}, "explore: token_budget"),
    ],
)
def test_bad_efforts(dc: Any, micro_z: Any, explore: Any, word: str) -> None:
    search = NoiseSearchPipeline(dc, redness, Threshold(0.5))
    with pytest.raises(ValueError, match=word):
        search("a heart", max_nfe=80, explore=explore, **CALL)
    plain = ZImagePipeline.from_pretrained(micro_z, torch_dtype=torch.float32)
    with pytest.raises(ValueError, match="explore: "):
        NoiseSearchPipeline(plain, redness, Threshold(0.5))("a heart", max_nfe=80, explore=explore, **CALL)
    with pytest.raises(ValueError, match="explore: policy smc"):
        NoiseSearchPipeline(dc, redness, "smc")("a heart", explore=EXPLORE, **CALL)


def test_the_toy_is_what_it_should_be() -> None:
    """The sum of a toy's picture grows with the bias, so that a forgotten evaluation anew shows in the score."""
    (full,), _, _ = run_policy(BestOfN(n=1), verifier=sum_of)
    (end,), _, _ = run_policy(BestOfN(n=1), verifier=sum_of, explore=CHEAP)
    assert torch.allclose(full.latents, end.latents) and full.score == pytest.approx(end.score)
