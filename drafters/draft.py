"""Draft a tree: static ones level by level, dynamic ones by confidence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastgen.drafters.drafter import Drafter, DraftState
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.tree import DynamicShape, Tree

__all__ = ["StaticPlan", "draft_dynamic", "draft_static"]


@dataclass(frozen=True)
class Level:
    """Nodes of one depth that have children, and those children.

    Attributes:
        nodes: [k] their indices.
        children: [m] indices of all their children.
        source: [m] index into `nodes` of each child's parent.
        slot: [m] which child of its parent it is.
        most: largest number of children of a node.
        first: number of nodes with children at smaller depths, without the root.
        mask: [1, k, first + k] which of those nodes, and of these, each one sees (the root is already committed).
        parents: [k] index into the level above of each node's parent; empty at the root.
    """

    nodes: Tensor
    children: Tensor
    source: Tensor
    slot: Tensor
    most: int
    first: int
    mask: Tensor
    parents: Tensor

    def to(self, device: torch.device) -> Level:
        """The same on another device."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


@dataclass(frozen=True)
class StaticPlan:
    """What all rounds of a static tree share.

    Attributes:
        tree: the topology.
        levels: depths 0 to max_depth - 1.
    """

    tree: Tree
    levels: list[Level]

    @classmethod
    def of(cls, tree: Tree) -> StaticPlan:
        """The plan of a static tree, on the CPU."""
        levels, grown = list[Level](), list[int]()
        above: list[int] = []
        for depth, members in enumerate(tree.levels[:-1]):
            nodes = [node for node in members.tolist() if int(tree.children[0, node, 0]) >= 0]
            edges = [
                (child, place, slot)
                for place, node in enumerate(nodes)
                for slot, child in enumerate(tree.children[0, node].tolist())
                if child >= 0
            ]
            seen = grown + nodes if depth else nodes
            levels.append(
                Level(
                    nodes=torch.tensor(nodes),
                    children=torch.tensor([edge[0] for edge in edges]),
                    source=torch.tensor([edge[1] for edge in edges]),
                    slot=torch.tensor([edge[2] for edge in edges]),
                    most=max(edge[2] for edge in edges) + 1,
                    first=len(grown),
                    mask=tree.mask[:, nodes][:, :, seen],
                    parents=torch.tensor([above.index(int(tree.parents[0, node])) for node in nodes] if depth else []),
                )
            )
            if depth:
                grown = seen
            above = nodes
        return cls(tree, levels)

    def to(self, device: torch.device) -> StaticPlan:
        """The same on another device."""
        tree = self.tree.to(device)
        return self if tree is self.tree else StaticPlan(tree, [level.to(device) for level in self.levels])

    @property
    def grown(self) -> int:
        """Nodes that the drafter evaluates: those with children, without the root."""
        return sum(len(level.nodes) for level in self.levels[1:])


def draft_static(
    drafter: Drafter,
    state: DraftState,
    plan: StaticPlan,
    root: Tensor,
    law: TokenLaw,
    index: Tensor,
    gumbel: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Draft a static tree.

    Args:
        drafter: has absorbed all committed tokens.
        state: its state.
        plan: of the tree.
        root: [B] the last committed token.
        law: guidance, temperature, top-k and top-p, as for the target.
        index: [B] the root's index in the picture.
        gumbel: [B, A, V] noise of the A nodes with children, to draw the children without replacement (Gumbel-top-k);
            None takes the most likely tokens.

    Returns:
        tokens [B, n], and q [B, n, V], 0 at leaves.
    """
    tree, target = plan.tree, state.target
    tokens = root[:, None].expand(-1, tree.n).clone()
    q = torch.zeros(len(root), tree.n, target.vocab_size, device=root.device)
    hidden, used = state.root, 0
    for depth, level in enumerate(plan.levels):
        if depth:
            parents = hidden.index_select(1, level.parents)
            places = torch.full((1, len(level.nodes)), depth, device=root.device)
            hidden = drafter.grow(state, tokens[:, level.nodes], parents, places, level.mask, level.first)
        logits = drafter.logits(state, hidden, depth)
        following = (index[:, None] + depth + 1).expand(-1, len(level.nodes))
        laws = target.token_law(logits, state.prefix, law, following)
        q[:, level.nodes] = laws
        scores = laws.log()
        if gumbel is not None:
            scores = scores + gumbel[:, used : used + len(level.nodes)]
            used += len(level.nodes)
        drawn = scores.topk(level.most, dim=-1).indices
        tokens[:, level.children] = drawn[:, level.source, level.slot]
    return tokens, q


def draft_dynamic(
    drafter: Drafter, state: DraftState, shape: DynamicShape, root: Tensor, law: TokenLaw, index: Tensor
) -> tuple[Tree, Tensor]:
    """Draft the most likely nodes (EAGLE-2, arXiv 2406.16858): expand `top_k` nodes at each depth, then keep the
    drafted nodes with the largest cumulative probability.

    Returns:
        a tree of `shape.nodes` + 1 nodes for every image, and its tokens [B, n].
    """
    target, width, device = state.target, shape.top_k, root.device
    batch = len(root)
    parents_state, grown_tokens = state.root, root[:, None]
    score = torch.zeros(batch, 1, device=device)
    # Drafted index of each expanded node; 0 is the root.
    owner = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    all_tokens, all_scores, all_parents = [root[:, None]], [score + 1.0], [owner]
    seen = torch.zeros(batch, 0, 0, dtype=torch.bool, device=device)
    hidden, drafted = parents_state, 1
    for depth in range(shape.depth):
        if depth:
            first = (depth - 1) * width
            places = torch.full((1, width), depth, device=device)
            hidden = drafter.grow(state, grown_tokens, parents_state, places, seen[:, first:], first)
        laws = target.token_law(
            drafter.logits(state, hidden, depth),
            state.prefix,
            law,
            (index[:, None] + depth + 1).expand(-1, hidden.shape[1]),
        )
        best = laws.log().topk(width, dim=-1)
        scores = (score[..., None] + best.values).flatten(1)
        tokens = best.indices.flatten(1)
        parents = owner[..., None].expand(-1, -1, width).flatten(1)
        all_tokens.append(tokens)
        all_scores.append(scores)
        all_parents.append(parents)
        if depth + 1 == shape.depth:
            break
        keep = scores.topk(width, dim=-1)
        score, place = keep.values, keep.indices
        source = place // width  # which of the expanded nodes is the parent
        grown_tokens = tokens.gather(1, place)
        owner = drafted + place
        drafted += tokens.shape[1]
        rows = target.both_rows(source, state.prefix)
        parents_state = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
        seen = _grow_mask(seen, source, width, depth)
    return _keep_best(shape, torch.cat(all_tokens, 1), torch.cat(all_scores, 1), torch.cat(all_parents, 1))


def _grow_mask(seen: Tensor, source: Tensor, width: int, depth: int) -> Tensor:
    """The square mask of expanded nodes, with `width` new ones: each sees itself and what its parent sees."""
    batch, before = len(source), seen.shape[1]
    if depth == 0:
        inherited = torch.zeros(batch, width, 0, dtype=torch.bool, device=source.device)
    else:
        inherited = seen[:, before - width :].gather(1, source[..., None].expand(-1, -1, before))
    own = torch.eye(width, dtype=torch.bool, device=source.device).expand(batch, -1, -1)
    above = torch.cat([seen, torch.zeros(batch, before, width, dtype=torch.bool, device=source.device)], dim=2)
    return torch.cat([above, torch.cat([inherited, own], dim=2)], dim=1)


def _keep_best(shape: DynamicShape, tokens: Tensor, scores: Tensor, parents: Tensor) -> tuple[Tree, Tensor]:
    """The root and the best nodes. A parent scores at least as high as its children, so the result is a tree."""
    # On equal scores (a child with probability 1) the stable sort prefers the parent, which was drafted first.
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, : shape.nodes + 1]
    kept = order.sort(dim=1).values
    numbers = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    place = torch.zeros_like(tokens).scatter(1, kept, numbers)
    tree = Tree.of_parents(place.gather(1, parents.gather(1, kept)), shape.depth, shape.top_k)
    return tree, tokens.gather(1, kept)
