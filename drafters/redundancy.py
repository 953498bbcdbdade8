"""Similarity of two nodes of a tree: of the target's hidden states or distributions, and of their descendants."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.drafters.tree import Tree
from fastgen.drafters.verify import Drafted

__all__ = [
    "convergence",
    "node_similarity",
    "sensitivity",
    "sibling_pairs",
    "sibling_states",
    "similarity",
    "total_variation",
]


def node_similarity(drafted: Drafted) -> Tensor:
    """Similarity [B, n, n] of all pairs of nodes.

    Raises:
        ValueError: the drafted tree has no hidden states.
    """
    return similarity(drafted.states(), drafted.states().mean(dim=1, keepdim=True))


def similarity(states: Tensor, centre: Tensor) -> Tensor:
    """Cosine [..., m, m] of all pairs of hidden states [..., m, F], centred first: raw ones all point in one
    direction."""
    centred = torch.nn.functional.normalize(states - centre, dim=-1)
    return centred @ centred.mT


def sibling_states(drafted: Drafted) -> Tensor:
    """Hidden states [B, A, C, F] of the children of inner nodes.

    Raises:
        ValueError: the drafted tree has no hidden states.
    """
    states, children = drafted.states(), drafted.inner_children().clamp_min(0)
    index = children.flatten(1)[..., None].expand(-1, -1, states.shape[-1])
    return states.gather(1, index).unflatten(1, children.shape[1:])


def sibling_pairs(values: Tensor, children: Tensor) -> Tensor:
    """Values [B, n, n] of node pairs as [B, A, C, C] of the children's pairs."""
    safe = children.clamp_min(0)
    batch = torch.arange(len(values), device=values.device)[:, None, None, None]
    return values[batch, safe[..., :, None], safe[..., None, :]]


def sensitivity(drafted: Drafted, states: Tensor, codes: Tensor) -> Tensor:
    """[B, A]: how far the hidden state moves with the code: the median over sibling pairs of the distance of their
    hidden states (in units of the mean norm) divided by that of their codes. Nodes without a pair use the median over
    the tree, or infinity if it has no pair.

    Args:
        drafted: the tree.
        states, codes: of the children [B, A, C, …].
    """
    siblings = states.shape[2]
    later, earlier = torch.tril_indices(siblings, siblings, -1, device=states.device)
    exists = drafted.tree.pairs[..., later, earlier]
    moved, apart = ((x.index_select(2, later) - x.index_select(2, earlier)).norm(dim=-1) for x in (states, codes))
    ratio = torch.where(exists & (apart > 0), moved / apart, torch.nan)
    everywhere = ratio.flatten(1).nanmedian(dim=-1, keepdim=True).values
    own = ratio[..., 0] if ratio.shape[-1] == 1 else ratio.nanmedian(dim=-1).values
    scale = drafted.states().norm(dim=-1).mean(dim=-1, keepdim=True).clamp_min(1e-12)
    return (own.where(~own.isnan(), everywhere) / scale).nan_to_num(nan=torch.inf)


def total_variation(laws: Tensor) -> Tensor:
    """Total variation [B, n, n] of all pairs of distributions [B, n, V], row by row: no [n, n, V] tensor."""
    rows = [(laws - laws[:, i : i + 1]).abs().sum(dim=-1) for i in range(laws.shape[1])]
    return torch.stack(rows, dim=1) / 2


def convergence(alike: Tensor, tree: Tree, horizon: int) -> Tensor:
    """The largest similarity [B, n, n] of descendants of u and w at equal depth, 1 … horizon below them.

    -inf where there are no such descendants.
    """
    batch = len(alike)
    children = tree.children.expand(batch, -1, -1)
    rows = torch.arange(batch, device=alike.device)[:, None, None, None, None]
    safe = children.clamp_min(0)
    exists = children >= 0
    both = exists[:, :, None, :, None] & exists[:, None, :, None, :]
    level, best = alike, torch.full_like(alike, -torch.inf)
    for _ in range(min(horizon, tree.max_depth)):
        pairs = level[rows, safe[:, :, None, :, None], safe[:, None, :, None, :]]
        level = pairs.masked_fill(~both, -torch.inf).amax(dim=(-1, -2))
        best = torch.maximum(best, level)
    return best
