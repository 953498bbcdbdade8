"""Attention of tree nodes: against one node after the other in float64, and what it writes to the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, assert_matches
from torch import Tensor

from fastgen.kernels.dispatch import ran, use_kernels
from fastgen.kernels.tree_attention import tree_attention


def case(
    rows: int, n: int, first: int, heads: int, groups: int, width: int, capacity: int, seed: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The last n of `first + n` nodes of a random tree, behind random lengths with holes in what may be seen."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    nodes = first + n
    tree = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        tree[node] |= tree[int(torch.randint(node, (1,), generator=generator))]
    lengths = torch.randint(0, capacity - nodes + 1, (rows,), generator=generator)
    return {
        "query": normal(rows, n, heads * groups, width),
        "key": normal(rows, n, heads, width),
        "value": normal(rows, n, heads, width),
        "store": normal(2, 2, rows, capacity, heads, width),
        "layer": 1,
        "slots": lengths[:, None] + first + torch.arange(n),
        "lengths": lengths,
        "visible": torch.rand(rows, capacity, generator=generator) < 0.7,
        "tree": tree[None, first:],
        "limit": capacity,
    }


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    store: Tensor,
    layer: int,
    slots: Tensor,
    lengths: Tensor,
    visible: Tensor,
    tree: Tensor,
    limit: int,
) -> tuple[Tensor, Tensor]:
    """Node by node: the output, and the store after it."""
    store = store.double().clone()
    rows, n, query_heads, width = query.shape
    output = torch.empty(query.shape, dtype=torch.float64)
    for row in range(rows):
        for i in range(n):
            store[layer, 0, row, slots[row, i]], store[layer, 1, row, slots[row, i]] = key[row, i], value[row, i]
        for i in range(n):
            start = int(lengths[row])
            seen = [slot for slot in range(start) if visible[row, slot]]
            seen += [start + j for j in range(tree.shape[2]) if tree[0, i, j]]
            for head in range(query_heads):
                keys, values = store[layer, :, row, seen, head // (query_heads // store.shape[4])]
                weights = (keys @ query[row, i, head].double() * width**-0.5).softmax(dim=0)
                output[row, i, head] = weights @ values
    return output, store


def on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in arguments.items()}


@pytest.mark.parametrize("mode", ["triton", "reference"])
@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 2),
    n=st.integers(1, 7),
    first=st.integers(0, 2),
    heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    width=st.sampled_from([8, 20, 64]),
    capacity=st.sampled_from([9, 64, 300]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_it_equals_the_oracle(
    mode: str,
    rows: int,
    n: int,
    first: int,
    heads: int,
    groups: int,
    width: int,
    capacity: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    arguments = case(rows, n, first, heads, groups, width, capacity, seed, dtype)
    wanted, filled = oracle(**arguments)
    given = on_device(arguments)
    given["store"] = given["store"].clone()
    with use_kernels(mode):
        got = tree_attention(**given)
    assert ran()["tree_attention"] == mode
    assert torch.equal(given["store"].cpu().double(), filled)
    # The reference is torch's attention, which rounds more often in half precision.
    loose = {} if dtype == torch.float32 and mode == "triton" else {"rms": 1e-2, "ulp": torch.inf}
    if dtype == torch.float32 and mode == "triton":
        loose = {"rms": 1e-5, "ulp": 256.0}
    assert_matches(got, wanted, **loose)


def test_strided_inputs(triton_kernels: None) -> None:
    """Query, key and value as parts of one projection."""
    arguments = case(2, 3, 0, 2, 1, 16, 40, 0, torch.float32)
    fused = torch.cat([arguments[name] for name in ("query", "key", "value")], dim=2).to(DEVICE)
    given = on_device(arguments)
    given["query"], given["key"], given["value"] = fused.split(2, dim=2)
    wanted, filled = oracle(**arguments)
    assert_matches(tree_attention(**given), wanted, rms=1e-5, ulp=256.0)
    assert torch.equal(given["store"].cpu().double(), filled)


def test_under_autocast_the_projections_are_rounded_to_the_store(triton_kernels: None) -> None:
    arguments = case(1, 3, 0, 1, 2, 16, 20, 0, torch.float32)
    rounded = {name: arguments[name].bfloat16() for name in ("query", "key", "value")}
    wanted, _ = oracle(**{**arguments, **rounded})
    got = tree_attention(**on_device({**arguments, **rounded}))
    assert got.dtype == torch.float32
    assert_matches(got, wanted, rms=1e-5, ulp=256.0)


def test_the_operator_passes_opcheck(triton_kernels: None) -> None:
    arguments = on_device(case(1, 2, 0, 1, 1, 8, 9, 0, torch.float32))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastgen.tree_attention.default, tuple(arguments.values()), test_utils=checks)


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_one_graph_changes_the_same_store(mode: str) -> None:
    arguments = on_device(case(1, 3, 0, 1, 2, 8, 12, 1, torch.float32))
    other = {**arguments, "store": arguments["store"].clone()}
    torch._dynamo.reset()  # a graph keeps its choice
    with use_kernels(mode):
        wanted = tree_attention(**arguments)
        got = torch.compile(tree_attention, fullgraph=True, backend="aot_eager")(**other)
    assert torch.equal(got, wanted) and torch.equal(arguments["store"], other["store"])


def test_bad_input() -> None:
    good = case(2, 3, 0, 2, 1, 16, 40, 0, torch.float32)
    for message, change in {
        "store: needs": {"store": good["store"][0]},
        "query: needs": {"query": good["query"][:, :, :1]},
        "key: needs": {"key": good["key"][:, :2]},
        "slots: needs torch.int64": {"slots": good["slots"].int()},
        "visible: needs torch.bool": {"visible": good["visible"][:, :-1]},
        "tree: needs bool": {"tree": good["tree"].float()},
        "limit: 41 is not allowed, needs an integer from 0 to 40": {"limit": 41},
        "slots: needs numbers in 0 … 39": {"slots": good["slots"] - 40},
        "lengths: needs numbers in 0 … 40, got 41": {"lengths": good["lengths"] * 0 + 41},
    }.items():
        with pytest.raises(ValueError, match=message):
            tree_attention(**{**good, **change})
    with use_kernels("triton"), pytest.raises(ValueError, match="float64"):
        tree_attention(**{**good, "store": good["store"].double()})
