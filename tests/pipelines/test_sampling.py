"""The law of image tokens: equal to the stock processors', and sampled exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import ClassifierFreeGuidanceLogitsProcessor

from fastgen.drafters.law import TokenLaw, gumbel_noise, token_logits
from fastgen.pipelines import sampling
from fastgen.pipelines.sampling import GuidedGumbelSampler

V = 12
LAWS = [
    TokenLaw(),
    TokenLaw(guidance_scale=3.0),
    TokenLaw(guidance_scale=2.0, temperature=0.7, top_k=5),
    TokenLaw(guidance_scale=2.0, temperature=1.4, top_p=0.8),
    TokenLaw(guidance_scale=4.0, temperature=1.2, top_k=7, top_p=0.9),
]


def stock_probabilities(cond: torch.Tensor, uncond: torch.Tensor, law: TokenLaw) -> torch.Tensor:
    """The same law by the processors of transformers, in the order in which `generate` puts them."""
    processors = LogitsProcessorList()
    if law.guidance_scale > 1:
        processors.append(ClassifierFreeGuidanceLogitsProcessor(law.guidance_scale))
    processors.append(TemperatureLogitsWarper(law.temperature))
    if law.top_k is not None:
        processors.append(TopKLogitsWarper(law.top_k))
    if law.top_p is not None:
        processors.append(TopPLogitsWarper(law.top_p))
    scores = torch.cat([cond, uncond]) if law.guidance_scale > 1 else cond
    return processors(torch.zeros(len(cond), 1, dtype=torch.long), scores).double().softmax(-1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    guidance=st.sampled_from([0.0, 1.0, 1.5, 7.0]),
    temperature=st.floats(0.1, 3),
    top_k=st.none() | st.integers(1, V + 3),
    top_p=st.none() | st.floats(0.05, 1),
)
def test_probabilities_equal_the_stock_processors(
    seed: int, guidance: float, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    cond, uncond = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(seed)) * 3
    law = TokenLaw(guidance, temperature, top_k, top_p)
    ours = token_logits(cond, uncond, law).double().softmax(-1)
    # A cumulated mass that meets p to the last bit may fall on either side; such a draw is one in a million.
    torch.testing.assert_close(ours, stock_probabilities(cond, uncond, law), rtol=1e-5, atol=1e-6)


def draw(law: TokenLaw, cond: torch.Tensor, uncond: torch.Tensor, generators: list[torch.Generator]) -> np.ndarray:
    """One token per generator, the way stock greedy generation takes it."""
    rows = len(generators)
    sampler = GuidedGumbelSampler(law, generators)
    scores = torch.cat([cond.expand(rows, -1), uncond.expand(rows, -1)])
    return sampler(torch.zeros(rows, 1, dtype=torch.long), scores).argmax(-1).numpy()  # type: ignore[arg-type]


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("source", ["one generator", "seeds"])
def test_samples_follow_the_stock_distribution(law: TokenLaw, source: str) -> None:
    """Chi-square, 4,000 draws, level 1e-6 (so that the suite of these ten fails by chance once in 100,000 runs).

    Power: the same draws must reject, at the same level, the law of a temperature that is off by a third. That is a
    total-variation distance of .09 to .16 and a noncentrality of 149 or more here: power above .999.
    """
    cond, uncond = torch.randn(2, 1, V, generator=torch.Generator().manual_seed(5)) * 0.6
    n = 4000
    if source == "seeds":
        generators = [torch.Generator().manual_seed(seed) for seed in range(n)]
    else:
        generators = [torch.Generator().manual_seed(1)] * n
    counts = np.bincount(draw(law, cond, uncond, generators), minlength=V)

    def p_value(expected_law: TokenLaw) -> float:
        expected = stock_probabilities(cond, uncond, expected_law)[0].numpy()
        if counts[expected == 0].any():
            return 0.0
        kept = expected > 0
        return float(stats.chisquare(counts[kept], expected[kept] / expected.sum() * n).pvalue)

    assert p_value(law) > 1e-6
    off = TokenLaw(law.guidance_scale, law.temperature * 1.33, law.top_k, law.top_p)
    assert p_value(off) < 1e-6


def test_rows_are_independent_of_each_other() -> None:
    cond, uncond = torch.randn(2, 6, V, generator=torch.Generator().manual_seed(2))
    law = TokenLaw(2.0)

    def scores(rows: list[int]) -> torch.Tensor:
        sampler = GuidedGumbelSampler(law, [torch.Generator().manual_seed(100 + row) for row in rows])
        return sampler(torch.zeros(len(rows), 1).long(), torch.cat([cond[rows], uncond[rows]]))  # type: ignore[arg-type]

    whole = scores(list(range(6)))
    for row in range(6):
        assert torch.equal(scores([row])[0], whole[row])
    assert torch.equal(scores([4, 1]), whole[[4, 1]])


def test_noise_is_standard_gumbel_with_its_tail() -> None:
    noise = gumbel_noise([torch.Generator().manual_seed(0)], 200_000, "cpu")[0].double().numpy()
    assert stats.kstest(noise, stats.gumbel_r.cdf).pvalue > 1e-6
    assert np.isfinite(noise).all()


def test_noise_of_the_extreme_uniforms_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (0.0, 1 - 2.0**-53):
        monkeypatch.setattr(torch, "rand", lambda *a, value=value, **k: torch.full((3,), value, dtype=torch.float64))
        noise = gumbel_noise([torch.Generator()], 3, "cpu")
        assert torch.isfinite(noise).all()
    assert noise.min() > 30  # float32 uniforms would stop at 16.6


def test_temperature_zero_draws_nothing() -> None:
    cond, uncond = torch.randn(2, 2, V, generator=torch.Generator().manual_seed(3))
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    before = [generator.get_state() for generator in generators]
    tokens = draw(TokenLaw(2.0, 0.0, top_k=3), cond[:1], uncond[:1], generators)
    assert tokens.tolist() == [int((uncond + 2 * (cond - uncond))[0].argmax())] * 2
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_margin_covers_every_change_within_rounding(law: TokenLaw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with a margin of 1 or more keep their token whatever rounding (here: made large) does to the scores."""
    monkeypatch.setattr(sampling, "ROUNDING", 0.01)
    rows, safe, moved = 400, 0, 0
    cond, uncond = torch.randn(2, rows, V, generator=torch.Generator().manual_seed(7)) * 2
    base = sampling.mix
    shift = torch.zeros(rows, V)
    monkeypatch.setattr(sampling, "mix", lambda c, u, law: base(c, u, law) + shift)
    ids = torch.zeros(rows, 1).long()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        sampler = GuidedGumbelSampler(law, [torch.Generator().manual_seed(seed) for seed in range(rows)])
        tokens = sampler(ids, torch.cat([cond, uncond])).argmax(-1)  # type: ignore[arg-type]
        assert sampler.margin is not None
        return tokens, sampler.margin

    tokens, margin = run()
    bound = GuidedGumbelSampler(law, [])._rounding(cond, uncond)
    for trial in range(8):
        sign = torch.rand(rows, V, generator=torch.Generator().manual_seed(trial)).sub(0.5).sign()
        shift = sign * bound * 0.999
        other, _ = run()
        changed = other != tokens
        assert not (changed & (margin >= 1)).any()
        moved += int(changed.sum())
    safe = int((margin >= 1).sum())
    assert moved > 0 and safe > rows // 4  # the test saw changes, and the margin does not just call all rows unsafe


@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance_scale": math.nan},
        {"guidance_scale": math.inf},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
    ],
)
def test_bad_values_name_the_argument(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        TokenLaw(**arguments)  # type: ignore[arg-type]
