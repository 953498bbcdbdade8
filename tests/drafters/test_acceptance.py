"""Relaxed rules: exact with their knobs at zero, and within the bound they promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_speculation import Toy, chi_square

from fastgen.drafters.acceptance import GSD, AcceptanceRule, CoolSD, Exact, Lantern, Neighbours
from fastgen.drafters.tree import chain, named_tree, static_tree
from fastgen.drafters.verify import Drafted, Rejection, reject_in_turn, strict

BOOK = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))
RULES: dict[str, Callable[[], Any]] = {
    "lantern": lambda: Lantern(Neighbours.of(BOOK, 5), delta=0.3),
    "lantern++": lambda: Lantern(Neighbours.of(BOOK, 5), delta=1.0, factor=3.0, k=3),
    "gsd": lambda: GSD(BOOK, group=4, radius=20.0),
    "cool-sd": lambda: CoolSD(delta=1.8, nu=0.3),
}
NEUTRAL: dict[str, Callable[[], Any]] = {
    "exact": Exact,
    "lantern": lambda: Lantern(Neighbours.of(BOOK, 5), delta=0.0),
    "lantern++": lambda: Lantern(Neighbours.of(BOOK, 5), delta=1.0, factor=1.0),
    "gsd": lambda: GSD(BOOK, group=1),
    "cool-sd": lambda: CoolSD(delta=1.0, nu=0.0),
}


@pytest.mark.parametrize("name", NEUTRAL)
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "top-k"])
def test_a_rule_without_relaxation_is_the_exact_one(name: str, sampled: bool) -> None:
    toy, tree = Toy.random(6, seed=1), named_tree("3-4-2")
    generator = torch.Generator().manual_seed(0)
    drafted = toy.draft(tree, torch.randint(6, (400, 2), generator=generator), sampled, generator)
    noise = toy.noise(400, tree, generator)
    ours, exact = NEUTRAL[name]().verify(drafted, noise, torch.zeros(400)), strict(drafted, noise)
    assert torch.equal(ours.child, exact.child)
    assert torch.allclose(ours.law, exact.law, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_a_relaxed_rule_accepts_more_and_is_lossy(name: str) -> None:
    toy, tree = Toy.random(6, seed=1), chain(2) if name == "gsd" else named_tree("3-2")
    rule: AcceptanceRule = RULES[name]()
    assert rule.name == name and rule.loss == "lossy"

    def verify(drafted: Drafted, noise: Any) -> Any:
        return rule.verify(drafted, noise, torch.zeros(len(drafted.tokens)))

    tokens, length = toy.first_three(tree, True, verify, 30_000, seed=5)
    _, exact = toy.first_three(tree, True, strict, 30_000, seed=5)
    assert length > exact + 0.02
    assert chi_square(tokens, toy.law_of_three((0, 1))) < 1e-9


def one_draw_law(p: torch.Tensor, q: torch.Tensor, rule: Rejection) -> torch.Tensor:
    """Exact distribution of one token with one drafted candidate."""
    vocabulary = len(p)
    tree = static_tree([[0]])
    tokens = torch.stack([torch.zeros(vocabulary, dtype=torch.int64), torch.arange(vocabulary)], dim=1)
    laws = (p.expand(vocabulary, 2, -1).float(), q.expand(vocabulary, 2, -1).float())
    drafted = Drafted(tree, tokens, *laws)
    outcome = reject_in_turn(drafted, torch.zeros(vocabulary, 2), rule)
    chance = outcome.chance[:, 0, 0].double()
    return q * chance + ((q * (1 - chance))[:, None] * outcome.residual[:, 0].double()).sum(dim=0)


@given(seed=st.integers(0, 10_000), delta=st.floats(0, 0.8))
@settings(max_examples=60, deadline=None)
def test_lantern_stays_within_its_delta(seed: int, delta: float) -> None:
    """What LANTERN promises: its target for a given x is at most delta from p in total variation. The result
    can differ more, because every x has its own target: up to 0.60 at delta = 0.5 was seen here."""
    generator = torch.Generator().manual_seed(seed)
    book = torch.randn(7, 2, generator=generator)
    p, q = torch.randn(2, 7, generator=generator, dtype=torch.float64).mul(1.5).softmax(-1)
    rule = Lantern(Neighbours.of(book, 6), delta=delta)
    assert float(one_draw_law(p, q, rule).sum()) == pytest.approx(1.0, abs=1e-5)
    target, tokens = p.expand(1, 7, 7).float(), torch.arange(7)[None]
    relaxed = rule.residual(target, torch.zeros_like(target), tokens, tokens)
    moved = (relaxed - target).abs().sum(dim=-1) / 2
    assert torch.allclose(moved, rule.stolen(target, tokens, tokens), atol=1e-6)
    assert float(moved.max()) <= delta + 1e-6


@given(seed=st.integers(0, 10_000), factor=st.floats(1, 6))
@settings(max_examples=40, deadline=None)
def test_lantern_plus_plus_stays_within_its_factor(seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(1, 1, 7, generator=generator).softmax(-1)
    rule = Lantern(Neighbours.of(torch.randn(7, 2, generator=generator), 6), delta=1.0, factor=factor)
    for token in range(7):
        x = torch.tensor([[token]])
        assert float(rule.stolen(p, x, x)) <= (factor - 1) * float(p[0, 0, token]) + 1e-6


@given(seed=st.integers(0, 10_000), group=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_gsd_accepts_at_least_what_the_exact_rule_does_on_average(seed: int, group: int) -> None:
    """Clusters that partition the tokens obey the triangle inequality; GSD's overlap, so this holds of the cluster of
    all tokens exactly and is checked for the others as acceptance >= the exact rule's less 5 %."""
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, 6, generator=generator, dtype=torch.float64).softmax(-1)
    exact = torch.minimum(p, q).sum()
    rule = GSD(BOOK, group=group, gap=2.0, radius=1e9)
    tokens = torch.arange(6)[None]
    ratio = rule.accept(p.expand(1, 6, 6).float(), q.expand(1, 6, 6).float(), tokens, tokens)
    accepted = float((q * ratio[0].double().clamp_max(1)).sum())
    assert accepted >= 0.95 * float(exact)
    everything = GSD(BOOK, group=40, gap=2.0, radius=1e9)
    whole = everything.accept(p.expand(1, 6, 6).float(), q.expand(1, 6, 6).float(), tokens, tokens)
    assert torch.allclose(whole, torch.ones_like(whole), atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Lantern(Neighbours.of(BOOK, 2), delta=1.5),
        lambda: Lantern(Neighbours.of(BOOK, 2), factor=0.5),
        lambda: Lantern(Neighbours.of(BOOK, 2), k=0),
        lambda: GSD(BOOK, group=0),
        lambda: CoolSD(delta=0.5),
    ],
)
def test_bad_knobs(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        make()
