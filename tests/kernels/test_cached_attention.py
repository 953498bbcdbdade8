"""Attention over a cache that is written first: against a float64 oracle, and its declaration for compilers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen.kernels.cached_attention import cached_attention


def case(
    rows: int, n: int, heads: int, groups: int, slots: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value, store of 2 layers, slots (others in every row), and a mask: every token sees itself."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, n, heads * groups, 8, generator=generator, dtype=dtype)
    key, value = torch.randn(2, rows, n, heads, 8, generator=generator, dtype=dtype)
    store = torch.randn(2, 2, rows, slots, heads, 8, generator=generator, dtype=dtype)
    places = torch.stack([torch.randperm(slots, generator=generator)[:n] for _ in range(rows)])
    mask = torch.rand(rows, 1, n, slots, generator=generator) < 0.5
    mask.scatter_(3, places[:, None, :, None], True)
    return query, key, value, store, places, mask


def oracle(
    query: Tensor, key: Tensor, value: Tensor, store: Tensor, layer: int, places: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Token by token in float64: the output, and the store after it."""
    store = store.double().clone()
    for row in range(len(query)):
        for i, slot in enumerate(places[row].tolist()):
            store[layer, 0, row, slot], store[layer, 1, row, slot] = key[row, i].double(), value[row, i].double()
    output = torch.empty(query.shape, dtype=torch.float64)
    groups = query.shape[2] // key.shape[2]
    for row, i, head in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        keys, values = store[layer, :, row, : mask.shape[-1], head // groups]
        scores = keys @ query[row, i, head].double() / query.shape[-1] ** 0.5
        output[row, i, head] = scores.masked_fill(~mask[row, 0, i], -torch.inf).softmax(dim=0) @ values
    return output, store


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 2), st.integers(1, 3), st.integers(5, 9), st.integers(0, 99)
)
def test_it_equals_the_oracle(rows: int, n: int, heads: int, groups: int, slots: int, seed: int) -> None:
    query, key, value, store, places, mask = case(rows, n, heads, groups, slots, seed)
    wanted, filled = oracle(query, key, value, store, 1, places, mask)
    got = cached_attention(query, key, value, store, 1, places, mask)
    assert torch.allclose(got.double(), wanted, atol=1e-5) and torch.equal(store.double(), filled)


def test_fewer_slots_than_the_store_and_another_dtype() -> None:
    """Under autocast the projections are in half precision, the store is not."""
    query, key, value, store, places, mask = case(2, 3, 2, 1, 9, 0)
    places, mask = places.clamp_max(5).sort(dim=1).values, mask[..., :6]
    places = torch.tensor([[0, 2, 5], [1, 3, 4]])
    mask.scatter_(3, places[:, None, :, None], True)
    wanted, _ = oracle(query.bfloat16(), key.bfloat16(), value.bfloat16(), store, 0, places, mask)
    got = cached_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), store, 0, places, mask)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 3])
def test_every_dtype_keeps_its_precision(dtype: torch.dtype, n: int) -> None:
    """A single token in half precision attends in float32, one in float64 does not."""
    query, key, value, store, places, mask = case(2, n, 2, 1, 9, 3, dtype)
    wanted, _ = oracle(query, key, value, store, 1, places, mask)
    got = cached_attention(query, key, value, store, 1, places, mask)
    assert got.dtype == dtype
    assert torch.allclose(got.double(), wanted, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-2)


def test_a_token_may_see_slots_behind_those_that_are_written() -> None:
    query, key, value, store, _, _ = case(1, 1, 2, 1, 9, 4)
    places, mask = torch.tensor([[2]]), torch.zeros(1, 1, 1, 9, dtype=torch.bool)
    mask[..., 7] = True
    wanted, _ = oracle(query, key, value, store, 1, places, mask)
    assert torch.allclose(cached_attention(query, key, value, store, 1, places, mask).double(), wanted, atol=1e-5)


@pytest.mark.parametrize(("rows", "n"), [(0, 2), (2, 0)])
def test_nothing_gives_nothing(rows: int, n: int) -> None:
    query, key, value = (torch.zeros(rows, n, 2, 8) for _ in range(3))
    store, places = torch.zeros(2, 2, rows, 5, 2, 8), torch.zeros(rows, n, dtype=torch.int64)
    mask = torch.ones(rows, 1, n, 5, dtype=torch.bool)
    assert cached_attention(query, key, value, store, 0, places, mask).shape == (rows, n, 2, 8)


def test_compiled_it_has_gradients() -> None:
    query, key, value, store, places, mask = case(2, 3, 2, 1, 7, 5)
    gradients = []
    for way in (cached_attention, torch.compile(cached_attention, backend="aot_eager")):
        leaf = query.clone().requires_grad_()
        way(leaf, key, value, store.clone(), 1, places, mask).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5) and gradients[0].abs().sum() > 0


@pytest.mark.parametrize("groups", [1, 2])
def test_the_operator_passes_opcheck(groups: int) -> None:
    query, key, value, store, places, mask = case(2, 3, 2, groups, 7, 1)
    checks = ("test_schema", "test_faketensor")
    arguments = (query, key, value, store, 1, places, mask)
    torch.library.opcheck(torch.ops.fastgen.cached_attention.default, arguments, test_utils=checks)


def test_compiled_it_changes_the_same_store() -> None:
    query, key, value, store, places, mask = case(2, 3, 2, 1, 7, 2)
    eager = store.clone()
    wanted = cached_attention(query, key, value, eager, 1, places, mask)

    def twice(store: Tensor) -> Tensor:
        first = cached_attention(query, key, value, store, 1, places, mask)
        return first + cached_attention(query, key, value, store, 0, places, mask)

    got = torch.compile(twice, fullgraph=True, backend="aot_eager")(store)
    other = cached_attention(query, key, value, eager, 0, places, mask)
    assert torch.allclose(got, wanted + other, atol=1e-6) and torch.equal(store, eager)
