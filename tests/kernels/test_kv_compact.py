"""Compaction of a key-value cache: slot by slot, with overlaps, and no other memory is written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE
from torch import Tensor

from fastgen.kernels.dispatch import ran, use_kernels
from fastgen.kernels.kv_compact import kv_compact

MODES = ["triton", "reference"]


def assert_compacted(before: Tensor, after: Tensor, lengths: Tensor, nodes: Tensor, count: Tensor) -> None:
    before, after = before.cpu(), after.cpu()
    for row in range(len(lengths)):
        start, kept = int(lengths[row]), int(count[row])
        assert torch.equal(after[:, :, row, :start], before[:, :, row, :start])
        wanted = before[:, :, row, start + nodes[row, :kept]]
        assert torch.equal(after[:, :, row, start : start + kept], wanted)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15, deadline=None)
@given(
    data=st.data(),
    layers=st.integers(1, 2),
    rows=st.integers(1, 3),
    heads=st.integers(1, 3),
    width=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_paths_move_down(
    mode: str, data: st.DataObject, layers: int, rows: int, heads: int, width: int, dtype: torch.dtype
) -> None:
    """Any nodes, also against the order of the tree, where sources are overwritten by earlier targets."""
    path = data.draw(st.integers(1, 5))
    nodes = torch.tensor(
        [data.draw(st.lists(st.integers(0, 7), min_size=path, max_size=path, unique=True)) for _ in range(rows)]
    )
    count = torch.tensor(data.draw(st.lists(st.integers(0, path), min_size=rows, max_size=rows)))
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows)))
    store = torch.randn(layers, 2, rows, 12, heads, width, generator=torch.Generator().manual_seed(path)).to(dtype)
    store = store.to(DEVICE)
    before = store.clone()
    with use_kernels(mode):
        kv_compact(store, *(x.to(DEVICE) for x in (lengths, nodes, count)))
    assert ran()["kv_compact"] == mode
    assert_compacted(before, store, lengths, nodes, count)


@pytest.mark.parametrize("mode", MODES)
def test_a_view_of_a_larger_cache(mode: str) -> None:
    """Rows and layers of a bigger buffer; memory outside the view keeps its values."""
    whole = torch.randn(3, 2, 4, 9, 2, 8).to(DEVICE)
    before = whole.clone()
    lengths, nodes, count = torch.tensor([1, 2]), torch.tensor([[0, 2, 3], [1, 0, 4]]), torch.tensor([3, 3])
    with use_kernels(mode):
        kv_compact(whole[1:, :, 1:3], *(x.to(DEVICE) for x in (lengths, nodes, count)))
    assert_compacted(before[1:, :, 1:3], whole[1:, :, 1:3], lengths, nodes, count)
    assert torch.equal(whole[0], before[0]) and torch.equal(whole[:, :, [0, 3]], before[:, :, [0, 3]])


@pytest.mark.parametrize("mode", MODES)
def test_slots_outside_the_cache_are_never_touched(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checks of values, as on a GPU."""
    monkeypatch.setattr("fastgen.kernels.kv_compact.checks_values", lambda tensor: False)
    whole = torch.randn(1, 2, 3, 6, 1, 4).to(DEVICE)
    before = whole.clone()
    lengths, nodes, count = torch.tensor([5]), torch.tensor([[3, 4, -9]]), torch.tensor([3])
    with use_kernels(mode):
        kv_compact(whole[:, :, 1:2], *(x.to(DEVICE) for x in (lengths, nodes, count)))
    assert torch.equal(whole, before)


@pytest.mark.parametrize("mode", MODES)
def test_nodes_past_the_count_do_not_matter(mode: str) -> None:
    """Nor that the path might reach beyond the cache."""
    store = torch.randn(1, 2, 3, 6, 1, 4).to(DEVICE)
    before = store.clone()
    lengths, count = torch.tensor([3, 4, 6]), torch.tensor([2, 1, 0])
    nodes = torch.tensor([[0, 2, 99, -7], [1, 2**40, 5, 5], [9, 9, 9, 9]])
    with use_kernels(mode):
        kv_compact(store, *(x.to(DEVICE) for x in (lengths, nodes, count)))
    assert_compacted(before, store, lengths, nodes, count)


def test_the_operator_passes_opcheck(triton_kernels: None) -> None:
    store, lengths = torch.randn(1, 2, 2, 6, 1, 4).to(DEVICE), torch.tensor([0, 1]).to(DEVICE)
    nodes, count = torch.tensor([[0, 2], [0, 3]]).to(DEVICE), torch.tensor([2, 2]).to(DEVICE)
    torch.library.opcheck(torch.ops.fastgen.kv_compact.default, (store, lengths, nodes, count))


@pytest.mark.parametrize("mode", MODES)
def test_one_graph(mode: str) -> None:
    store = torch.randn(2, 2, 2, 8, 1, 4).to(DEVICE)
    other = store.clone()
    nodes, count = torch.tensor([[0, 2, 4], [0, 1, 5]]).to(DEVICE), torch.tensor([3, 2]).to(DEVICE)

    def commit(store: Tensor, lengths: Tensor) -> Tensor:
        kv_compact(store, lengths, nodes, count)
        return lengths + count

    lengths = torch.tensor([1, 2]).to(DEVICE)
    torch._dynamo.reset()  # a graph keeps its choice
    with use_kernels(mode):
        wanted = commit(other, lengths)
        got = torch.compile(commit, fullgraph=True, backend="aot_eager")(store, lengths)
    assert torch.equal(got, wanted) and torch.equal(store, other)


def test_bad_input() -> None:
    store, three = torch.zeros(1, 2, 3, 6, 1, 4), torch.zeros(3, dtype=torch.int64)
    nodes = torch.zeros(3, 2, dtype=torch.int64)
    for message, arguments in {
        "store, nodes: need": (store[0], three, nodes, three),
        "lengths, count: need \\[3\\]": (store, three[:2], nodes, three),
        "lengths, nodes, count: need torch.int64": (store, three, nodes, three.int()),
        "got torch.int64, torch.float32": (store, three, nodes.float(), three),
    }.items():
        with pytest.raises(ValueError, match=message):
            kv_compact(*arguments)
    with use_kernels("triton"), pytest.raises(ValueError, match="not contiguous"):
        kv_compact(store.transpose(3, 4).contiguous().transpose(3, 4)[..., ::2], three, nodes, three)
