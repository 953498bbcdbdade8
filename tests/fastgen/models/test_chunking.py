"""Elastic chunking, routers and the ratio loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.models.chunking import confidence, ratio_loss, select_chunks, straight_through
from fastgen.models.routers import ROUTERS, build_router
from fastgen.models.scaffold import norm_groups


def random_probabilities(samples: int, length: int, seed: int, levels: int = 20) -> torch.Tensor:
    """Few distinct values, so that there are many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels + 1, (samples, length), generator=generator).float() / levels


def naive_kept(p: list[float], rho: float, budget: int | None) -> list[int]:
    """The definition, one sample at a time."""
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if budget is not None:
        return sorted(order[:budget])
    natural = [i for i in order if p[i] > 0.5]
    if not natural:
        return order[:1]
    from fractions import Fraction

    dropped = int(Fraction(str(rho)) * len(natural))
    return sorted(natural[: len(natural) - dropped])


@settings(max_examples=150, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rhos=st.lists(st.integers(0, 99), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_tail_drop_equals_the_definition(grid: tuple[int, int], rhos: list[int], seed: int) -> None:
    p = random_probabilities(len(rhos), grid[0] * grid[1], seed)
    chunks = select_chunks(p, grid, [rho / 100 for rho in rhos])
    starts = chunks.segments.cu_seqlens.tolist()
    for i, rho in enumerate(rhos):
        expected = naive_kept(p[i].tolist(), rho / 100, None)
        assert chunks.mask[i].nonzero().squeeze(1).tolist() == expected
        assert chunks.lengths[i] == len(expected) == starts[i + 1] - starts[i]
        part = slice(starts[i], starts[i + 1])
        assert (chunks.positions[part] - i * p.shape[1]).tolist() == expected
        assert chunks.segments.sequence_ids[part].tolist() == [i] * len(expected)


@settings(max_examples=80, deadline=None)
@given(grid=st.tuples(st.integers(1, 8), st.integers(1, 8)), seed=st.integers(0, 10**6), data=st.data())
def test_budget_keeps_exactly_the_likeliest(grid: tuple[int, int], seed: int, data: Any) -> None:
    length = grid[0] * grid[1]
    budgets = data.draw(st.lists(st.integers(1, length), min_size=3, max_size=3))
    p = random_probabilities(3, length, seed, levels=4)
    chunks = select_chunks(p, grid, token_budget=budgets)
    assert list(chunks.lengths) == budgets and chunks.segments.max_seqlen == max(budgets)
    for i in range(3):
        assert chunks.mask[i].nonzero().squeeze(1).tolist() == naive_kept(p[i].tolist(), 0.0, budgets[i])
    one, other = (select_chunks(p, grid, token_budget=budget) for budget in (budgets[0], [budgets[0]] * 3))
    assert one.lengths == other.lengths and torch.equal(one.mask, other.mask)
    assert one.segments.equal_length == other.segments.equal_length == budgets[0]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rhos=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)))
def test_more_tail_drop_keeps_a_subset(seed: int, rhos: tuple[float, float]) -> None:
    p = random_probabilities(4, 48, seed)
    less, more = (select_chunks(p, (6, 8), rho) for rho in sorted(rhos))
    assert bool((more.mask <= less.mask).all()) and bool(
        (less.mask <= (less.natural | (less.natural.sum(1) == 0)[:, None])).all()
    )
    assert torch.equal(less.natural, more.natural)


def test_a_sample_does_not_depend_on_the_batch() -> None:
    p = random_probabilities(5, 36, 3, levels=3)
    rho = [0.0, 0.25, 0.5, 0.75, 0.9]
    batch = select_chunks(p, (6, 6), rho)
    for i in range(5):
        assert torch.equal(select_chunks(p[i : i + 1], (6, 6), rho[i]).mask[0], batch.mask[i])


def test_an_empty_natural_set_keeps_the_likeliest_position() -> None:
    p = torch.tensor([[0.1, 0.5, 0.5, 0.2]])
    for rho in (0.0, 0.9):
        chunks = select_chunks(p, (2, 2), rho)
        assert chunks.mask.tolist() == [[False, True, False, False]] and not bool(chunks.natural.any())


def test_products_just_below_an_integer_are_that_integer() -> None:
    p = torch.ones(1, 100)
    assert select_chunks(p, (10, 10), 0.29).lengths == (71,)
    assert select_chunks(p, (10, 10), 0.57).lengths == (43,)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"tail_drop": -0.1}, "tail_drop"),
        ({"tail_drop": 1.0}, "tail_drop"),
        ({"tail_drop": float("nan")}, "tail_drop"),
        ({"tail_drop": "much"}, "tail_drop"),
        ({"tail_drop": [0.1]}, "tail_drop"),
        ({"tail_drop": [0.1, 0.2, 0.3]}, "tail_drop"),
        ({"token_budget": 0}, "token_budget"),
        ({"token_budget": -1}, "token_budget"),
        ({"token_budget": 13}, "token_budget"),
        ({"token_budget": 2.0}, "token_budget"),
        ({"token_budget": True}, "token_budget"),
        ({"token_budget": [3]}, "token_budget: needs one number or 2, one per sample; got 1"),
        ({"token_budget": [3, 13]}, "token_budget: 13 is not allowed"),
        ({"token_budget": [3, 2.0]}, "token_budget"),
        ({"token_budget": 3, "tail_drop": 0.5}, "exclude each other"),
    ],
)
def test_bad_knobs_name_the_argument(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_chunks(torch.rand(2, 12), (3, 4), **knobs)


def test_bad_shapes() -> None:
    for shape in ((2, 11), (12,), (0, 12)):
        with pytest.raises(ValueError, match="probabilities"):
            select_chunks(torch.rand(*shape), (3, 4))


def test_a_budget_of_all_positions_keeps_all() -> None:
    chunks = select_chunks(torch.rand(2, 6), (2, 3), token_budget=6)
    assert chunks.lengths == (6, 6) and chunks.positions.tolist() == list(range(12)) and chunks.kept_fraction == 1.0


# ---- ratio loss ----


@pytest.mark.parametrize("compression", [2.0, 4.0, 8.0])
def test_ratio_loss_has_its_minimum_at_the_target(compression: float) -> None:
    """With p in step with the kept ratio, r = p = 1 / N is the minimum, and its value is 1."""
    values = {}
    for kept in range(1, 64):
        natural = (torch.arange(64) < kept)[None]
        values[kept] = float(ratio_loss(torch.full((1, 64), kept / 64), natural, compression))
    assert min(values, key=values.__getitem__) == round(64 / compression)
    assert values[round(64 / compression)] == pytest.approx(1.0)


@pytest.mark.parametrize(("kept", "sign"), [(8, -1), (40, 1)])
def test_ratio_loss_pushes_probabilities_the_right_way(kept: int, sign: int) -> None:
    p = torch.full((1, 64), 0.25, requires_grad=True)
    ratio_loss(p, (torch.arange(64) < kept)[None], 4.0).backward()
    assert p.grad is not None and bool((p.grad * sign > 0).all())


def test_ratio_loss_of_groups_is_their_mean() -> None:
    p, natural = torch.rand(32, 20), torch.rand(32, 20) < 0.4
    halves = [ratio_loss(p[i : i + 16], natural[i : i + 16]) for i in (0, 16)]
    torch.testing.assert_close(ratio_loss(p, natural, group=16), torch.stack(halves).mean())
    assert not torch.isclose(ratio_loss(p, natural, group=16), ratio_loss(p, natural, group=1))
    with pytest.raises(ValueError, match="compression"):
        ratio_loss(p, natural, 1.0)


def test_straight_through_and_confidence() -> None:
    p = torch.tensor([[0.9, 0.2, 0.7, 0.6]], requires_grad=True)
    chunks = select_chunks(p, (2, 2), 0.5)
    c = confidence(chunks)
    torch.testing.assert_close(c, torch.tensor([[0.9, 0.8, 0.7, 0.4]]))
    gate = straight_through(c)
    assert torch.equal(gate, torch.ones(1, 4))
    gate.sum().backward()
    assert p.grad is not None and p.grad.tolist() == [[1.0, -1.0, 1.0, -1.0]]


# ---- routers ----


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 3), (8, 8)])
def test_routers_give_finite_logits_on_any_grid(kind: Any, grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    logits = build_router(kind, 16, 8)(torch.randn(2, grid[0] * grid[1], 16), grid)
    assert logits.shape == (2, grid[0] * grid[1]) and logits.dtype == torch.float32
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_see_a_difference_only_where_it_is(kind: Any) -> None:
    """A constant field is equally predictable everywhere; one odd token changes its neighbourhood only."""
    torch.manual_seed(0)
    router = build_router(kind, 16, 8)
    tokens = torch.randn(16).expand(1, 81, 16).clone()
    flat = router(tokens, (9, 9))
    torch.testing.assert_close(flat, flat[:, :1].expand(1, 81), rtol=1e-4, atol=1e-4)
    tokens[0, 40] = torch.randn(16)
    odd = router(tokens, (9, 9)).view(9, 9)
    changed = ((odd - flat.view(9, 9)).abs() > 1e-3).nonzero()
    assert len(changed) > 0 and int((changed - 4).abs().max()) <= 2


def test_without_the_centre_tap_a_feature_cannot_predict_itself() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(1, 25, 16)
    for center_tap, same in ((False, True), (True, False)):
        router = build_router("predictability", 16, 8, center_tap)
        before = router(tokens, (5, 5))
        with torch.no_grad():
            router.predictor.weight[:, :, 1, 1] += 1.0  # type: ignore[union-attr, index]
        assert torch.equal(router(tokens, (5, 5)), before) is same


def test_unknown_router() -> None:
    with pytest.raises(ValueError, match="router: 'psychic'"):
        build_router("psychic", 16, 8)  # type: ignore[arg-type]


def test_norm_groups_divide() -> None:
    assert [norm_groups(c) for c in (96, 192, 48, 7, 1)] == [32, 32, 24, 1, 1]
