"""The cache of keys and values: what a commit moves, what a node may see, and that memory is committed + tree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from micro_models import JANUS_TOKENS, PROMPTS

from fastgen.drafters import cache as module
from fastgen.drafters.acceptance import Exact
from fastgen.drafters.cache import KVCache, mask_for_tree
from fastgen.drafters.decode import decode_speculative
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.sources import DraftSource, JacobiSource, TreeSource
from fastgen.drafters.targets import Target
from fastgen.drafters.tree import named_tree


def made(rows: int, prompt: int, room: int, pads: list[int], layers: int = 2) -> KVCache:
    """A cache whose every slot holds a number of its own."""
    mask = torch.ones(rows, prompt, dtype=torch.bool)
    for row, count in enumerate(pads):
        mask[row, :count] = False
    found = KVCache.allocate(layers, mask, room, 2, 3, torch.float32)
    found.store.copy_(torch.arange(found.store.numel(), dtype=torch.float32).view_as(found.store))
    return found


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_commit_moves_a_path_in_all_layers_and_rows(data: st.DataObject) -> None:
    """Against a loop over slots; paths overlap with where they go, and rows keep different numbers of nodes."""
    rows, prompt, nodes = (data.draw(st.integers(low, high)) for low, high in ((1, 3), (1, 4), (1, 6)))
    committed = data.draw(st.integers(0, 3))
    cache = made(rows, prompt, committed + 2 * nodes, [0] * rows)
    cache.advance(prompt + committed, prompt + committed)
    depth = data.draw(st.integers(1, nodes))
    paths = [
        sorted(data.draw(st.sets(st.integers(0, nodes - 1), min_size=depth, max_size=depth))) for _ in range(rows)
    ]
    counts = [data.draw(st.integers(0, depth)) for _ in range(rows)]
    before, start = cache.store.clone(), prompt + committed
    pointer = cache.store.data_ptr()
    cache.commit(torch.tensor(paths), torch.tensor(counts))
    assert cache.store.data_ptr() == pointer
    assert cache.lengths.tolist() == [start + count for count in counts]
    for row in range(rows):
        assert torch.equal(cache.store[:, :, row, :start], before[:, :, row, :start])
        for place in range(counts[row]):
            moved, source = cache.store[:, :, row, start + place], before[:, :, row, start + paths[row][place]]
            assert torch.equal(moved, source)


@settings(max_examples=40, deadline=None)
@given(
    pads=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    extra=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    widths=st.sampled_from(["1", "chain-3", "2-2", "3-1-2"]),
)
def test_a_node_sees_what_is_committed_and_its_ancestors(pads: list[int], extra: list[int], widths: str) -> None:
    tree, prompt = named_tree(widths), 3
    cache = made(len(pads), prompt, 4 + tree.n, pads)
    cache.lengths = prompt + torch.tensor(extra[: len(pads)])
    cache.bound = prompt + 3
    seen = mask_for_tree(cache, tree.mask)
    assert isinstance(seen, torch.Tensor)
    assert seen.shape == (len(pads), 1, tree.n, prompt + 3 + tree.n)
    for row, count in enumerate(pads):
        length = int(cache.lengths[row])
        for node in range(tree.n):
            ancestors, at = {node}, node
            while at:
                at = int(tree.parents[0, at])
                ancestors.add(at)
            expected = set(range(count, length)) | {length + place for place in ancestors}
            assert set(seen[row, 0, node].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("kind", ["tree", "window"])
def test_memory_is_committed_and_tree_and_does_not_grow(
    target: Target, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All caches of a call are allocated before its first round, at that size; after that they only shrink, where
    images leave the batch."""
    caches: list[tuple[KVCache, torch.Size]] = []
    allocate = KVCache.allocate.__func__  # type: ignore[attr-defined]

    def recorded(cls: type[KVCache], *args: object, **kwargs: object) -> KVCache:
        found: KVCache = allocate(cls, *args, **kwargs)
        caches.append((found, found.store.shape))
        return found

    monkeypatch.setattr(module.KVCache, "allocate", classmethod(recorded))
    source: DraftSource = JacobiSource(5, 2)
    if kind == "tree":
        drafter = EagleDrafter.for_target(target, width=16, heads=2).eval().requires_grad_(False)
        source = TreeSource(drafter, named_tree("3-2"), sampled=True)
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:2], True)
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        decoded = decode_speculative(target, source, Exact(), prefix, TokenLaw(3.0), generators)
    assert int(decoded.rounds.max()) > 2 and len(caches) == (2 if kind == "tree" else 1)
    prompt = prefix.mask.shape[1]
    for cache, first in caches:
        rows = cache.store.shape[2]
        assert rows <= first[2] and cache.store.shape == (*first[:2], rows, *first[3:])
        assert cache.capacity <= prompt + JANUS_TOKENS + 2 * source.nodes + source.max_depth + 1
    layers, both, rows, capacity, _, _ = caches[0][1]
    assert (layers, both, rows) == (len(target.layers), 2, 4)  # keys and values; two pictures with guidance
    assert capacity == prompt + JANUS_TOKENS + source.nodes + source.max_depth + 1
