"""Token trees: which drafted token follows which, as tensors for one target pass and one verification.

A tree has n nodes; node 0 is the root, the last committed token, and parents come before their children. Static trees
have one topology for all rounds and images; dynamic ones differ by image and round, with the same n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastgen.checks import check_integer
from fastgen.drafters.names import check_nodes, check_tree_name, tree_widths
from fastgen.errors import FastgenError

__all__ = ["DynamicShape", "Tree", "chain", "named_tree", "static_tree"]


@dataclass(frozen=True)
class Tree:
    """Topology of `n` nodes for one image or for all.

    Attributes:
        parents: [b, n] int64, b = 1 (the same for all images) or B; the root is its own parent.
        children: [b, n, C] int64, in the order in which they are drawn and verified; -1 where there are fewer than C.
        depth: [b, n] int64, 0 at the root.
        mask: [b, n, n] bool, row i: node i, its ancestors and the root.
        max_depth: the largest depth (a bound for dynamic trees).
        internal: [A] int64, inner nodes: those with children, the only ones that verification reads; all in dynamic
            trees.
        inner: [b, A, C] int64, the children of inner nodes.
        pairs: [b, A, C, C] bool, pairs of siblings: the later one's row, the earlier one's column.
    """

    parents: Tensor
    children: Tensor
    depth: Tensor
    mask: Tensor
    max_depth: int
    internal: Tensor
    inner: Tensor
    pairs: Tensor

    @property
    def n(self) -> int:
        """Nodes, root included: the tokens of one target pass."""
        return int(self.parents.shape[1])

    @property
    def max_children(self) -> int:
        return int(self.children.shape[2])

    @property
    def levels(self) -> list[Tensor]:
        """Node indices of each depth, for a static tree; level 0 is the root."""
        return [(self.depth[0] == depth).nonzero().flatten() for depth in range(self.max_depth + 1)]

    def to(self, device: torch.device | str) -> Tree:
        """The same tree on another device."""
        if self.parents.device == torch.device(device):
            return self
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    @classmethod
    def of_parents(cls, parents: Tensor, max_depth: int, max_children: int, static: bool = False) -> Tree:
        """The tree with these parents.

        Args:
            parents: [b, n], every parent before its children; children are verified in the order of their indices.
            max_depth: upper bound of the depth.
            max_children: upper bound of a node's children.
            static: one topology for all images, b = 1, read on the host; reading a dynamic one would stall a GPU.
        """
        b, n = parents.shape
        device = parents.device
        own = torch.eye(n, dtype=torch.bool, device=device).expand(b, n, n)
        # Ancestors by doubling: after k rounds every row holds those up to 2^k levels up.
        reach = own | torch.zeros_like(own).scatter(2, parents[..., None], True)
        for _ in range(max(1, max_depth).bit_length()):
            reach = (reach.float() @ reach.float()) > 0
        depth = reach.sum(dim=2) - 1
        # Slot of a node among its siblings: how many before it have the same parent.
        is_child = torch.arange(n, device=device) > 0
        same = (parents[:, :, None] == parents[:, None, :]) & is_child[:, None] & is_child[None, :]
        slot = (same & torch.ones(n, n, dtype=torch.bool, device=device).tril(-1)).sum(dim=2)
        flat = torch.full((b, n * max_children + 1), -1, dtype=torch.int64, device=device)
        target = torch.where(is_child, parents * max_children + slot, n * max_children)
        flat.scatter_(1, target, torch.arange(n, device=device).expand(b, n))
        children = flat[:, :-1].unflatten(1, (n, max_children))
        numbers = torch.arange(n, device=device)
        internal = numbers[children[0, :, 0] >= 0] if static else numbers
        inner = children.index_select(1, internal)
        pairs = ((inner >= 0)[..., :, None] & (inner >= 0)[..., None, :]).tril(-1)
        return cls(parents, children, depth, reach, max_depth, internal, inner, pairs)


def static_tree(paths: Sequence[Sequence[int]]) -> Tree:
    """A tree from rank paths: [0, 1] is the second child of the first child of the root.

    Args:
        paths: every node's path; missing prefixes are added. Siblings must have ranks 0, 1, 2 … without a gap: slot j
            of a node is the j-th token drawn there.

    Raises:
        ValueError: no path, a negative rank, or a gap in the ranks.
    """
    nodes = {tuple(path[: i + 1]) for path in paths for i in range(len(path))}
    if not nodes:
        raise FastgenError("tree: needs at least one path")
    for node in nodes:
        if node[-1] < 0 or any(not isinstance(rank, int) for rank in node):
            raise FastgenError(f"tree: {list(node)} is not a path of ranks >= 0")
        if node[-1] > 0 and (*node[:-1], node[-1] - 1) not in nodes:
            raise FastgenError(f"tree: {list(node)} is there, but not its sibling of rank {node[-1] - 1}")
    order = [(), *sorted(nodes, key=lambda node: (len(node), node))]
    index = {node: i for i, node in enumerate(order)}
    parents = torch.tensor([[index[node[:-1]] for node in order]])
    most = max(node[-1] for node in nodes) + 1
    return Tree.of_parents(parents, max_depth=max(map(len, nodes)), max_children=most, static=True)


def chain(length: int) -> Tree:
    """A chain of tokens, without alternatives."""
    return widths_tree([1] * length)


def widths_tree(widths: Sequence[int]) -> Tree:
    """A tree with these numbers of nodes at each depth; parents of lower rank have more children (harmonic shares).

    Raises:
        ValueError: no depth, or a width below 1.
    """
    if not widths or any(width < 1 for width in widths):
        raise FastgenError(f"tree: widths {list(widths)} are not allowed, needs one number >= 1 for each depth")
    paths: list[tuple[int, ...]] = []
    parents: list[tuple[int, ...]] = [()]
    for width in widths:
        # A harmonic share: the parent of rank r gets its k-th child where 1 / ((r + 1) k) is among the largest.
        places = sorted(
            ((place + 1) * (rank + 1), place, rank) for place in range(len(parents)) for rank in range(width)
        )
        level = sorted((*parents[place], rank) for _, place, rank in places[:width])
        paths += level
        parents = sorted(level, key=sum)
    return static_tree(paths)


def named_tree(name: str) -> Tree:
    """A tree by its command-line name: "chain-5", "small", "wide", "lantern-25", "lantern-57", or widths "4-2-1".

    Raises:
        ValueError: unknown name.
    """
    check_tree_name("tree", name)
    widths = tree_widths(name)
    if widths is None:
        raise FastgenError(f"tree: {name!r} is not a tree")
    return widths_tree(widths)


@dataclass(frozen=True, slots=True)
class DynamicShape:
    """Size of a confidence-ranked tree (EAGLE-2).

    Attributes:
        nodes: nodes to verify, without the root.
        depth: levels of nodes.
        top_k: children drafted per node, and nodes expanded at the next level.

    Raises:
        ValueError: a number below 1, or more nodes than are drafted.
    """

    nodes: int = 24
    depth: int = 4
    top_k: int = 4

    def __post_init__(self) -> None:
        for name in ("nodes", "depth", "top_k"):
            check_integer(f"tree: {name}", getattr(self, name), 1)
        check_nodes("tree", self, self.drafted)
        if self.nodes > self.drafted:
            raise FastgenError(f"tree: {self.nodes} nodes of {self.drafted} that depth and top_k draft")

    @property
    def drafted(self) -> int:
        """Number of drafted nodes; the best `nodes` of them are kept."""
        return self.top_k + (self.depth - 1) * self.top_k**2
