"""Tree topology against a plain walk over paths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.drafters.tree import DynamicShape, Tree, chain, named_tree, static_tree, widths_tree


@given(parents=st.lists(st.integers(0, 100), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_topology_of_parents(parents: list[int]) -> None:
    """Masks, depths and children by following the parents one by one."""
    parents = [0, *(parent % (i + 1) for i, parent in enumerate(parents))]
    n = len(parents)
    ancestors = [{0}]
    for i in range(1, n):
        ancestors.append(ancestors[parents[i]] | {i})
    children: list[list[int]] = [[] for _ in range(n)]
    for i in range(1, n):
        children[parents[i]].append(i)
    depth, most = max(map(len, ancestors)) - 1, max(map(len, children))
    tree = Tree.of_parents(torch.tensor([parents, parents]), depth, most)
    for row in range(2):
        assert [set(torch.where(line)[0].tolist()) for line in tree.mask[row]] == ancestors
        assert tree.depth[row].tolist() == [len(line) - 1 for line in ancestors]
        assert [[c for c in line.tolist() if c >= 0] for line in tree.children[row]] == children
    single = Tree.of_parents(torch.tensor([parents]), depth, most, static=True)
    assert single.internal.tolist() == [i for i in range(n) if children[i]]
    assert [node for level in single.levels for node in sorted(level.tolist())] == sorted(
        range(n), key=lambda i: (len(ancestors[i]), i)
    )


@given(widths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_tree_of_widths_has_them(widths: list[int]) -> None:
    tree = widths_tree(widths)
    assert [len(level) for level in tree.levels] == [1, *widths]
    assert tree.max_depth == len(widths)


def test_named_trees() -> None:
    assert named_tree("chain-4").parents.tolist() == chain(4).parents.tolist() == [[0, 0, 1, 2, 3]]
    assert named_tree("lantern-25").n == 26 and named_tree("lantern-57").n == 58
    assert [len(level) for level in named_tree("4-2-1").levels] == [1, 4, 2, 1]
    for name in ("chain-0", "chain-x", "", "4--1", "0-1", "tall"):
        with pytest.raises(ValueError, match="tree"):
            named_tree(name)


def test_first_ranks_get_the_deep_subtrees() -> None:
    tree = named_tree("2-2-1")
    assert tree.children[0].tolist()[:3] == [[1, 2], [3, 4], [-1, -1]]


@pytest.mark.parametrize("paths", [[], [[-1]], [[1]], [[0], [0, 1]], [[0.5]]])
def test_bad_paths(paths: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="tree"):
        static_tree(paths)


def test_paths_bring_their_prefixes() -> None:
    assert static_tree([[0, 0, 0]]).parents.tolist() == chain(3).parents.tolist()


@pytest.mark.parametrize("shape", [{"nodes": 0}, {"depth": 0}, {"top_k": 0}, {"nodes": 99, "depth": 2, "top_k": 2}])
def test_bad_dynamic_shapes(shape: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="tree"):
        DynamicShape(**shape)
