"""How alike the target finds two nodes of a tree: similarity of their hidden states or laws, and convergence below."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.drafters.tree import Tree
from fastgen.drafters.verify import Drafted

__all__ = [
    "are_siblings",
    "convergence",
    "law_distance_bound",
    "sensitivity",
    "sibling_pairs",
    "similarity",
    "total_variation",
]


def similarity(drafted: Drafted) -> Tensor:
    """Cosine [B, n, n] of all pairs of nodes' hidden states, which are centred first: raw ones all point one way.

    Raises:
        ValueError: the drafted tree has no hidden states.
    """
    if drafted.hidden is None:
        raise ValueError("similarity: needs the target's hidden states")
    states = drafted.hidden.float()
    centred = torch.nn.functional.normalize(states - states.mean(dim=1, keepdim=True), dim=-1)
    return centred @ centred.mT


def sibling_pairs(values: Tensor, children: Tensor) -> Tensor:
    """Values [B, n, n] of node pairs as [B, A, C, C] of the children's pairs."""
    safe = children.clamp_min(0)
    batch = torch.arange(len(values), device=values.device)[:, None, None, None]
    return values[batch, safe[..., :, None], safe[..., None, :]]


def are_siblings(children: Tensor) -> Tensor:
    """[B, A, C, C] bool: both places of a pair hold a child."""
    exists = children >= 0
    return exists[..., :, None] & exists[..., None, :]


def sensitivity(drafted: Drafted, codebook: Tensor) -> Tensor:
    """[B, A]: how far the hidden state moves with the code: the median over sibling pairs of the distance of their
    hidden states (in units of the mean norm) over that of their codes. Where a node has no pair it is the median over
    all pairs of the tree, and infinite where there is none at all.

    Raises:
        ValueError: the drafted tree has no hidden states.
    """
    if drafted.hidden is None:
        raise ValueError("sensitivity: needs the target's hidden states")
    children, codes = drafted.inner_children(), codebook[drafted.child_tokens()]
    left, right = torch.triu_indices(children.shape[-1], children.shape[-1], 1, device=children.device)
    if not len(left):
        return torch.full(children.shape[:2], torch.inf, device=children.device)
    batch = torch.arange(len(children), device=children.device)[:, None, None]
    states = drafted.hidden[batch, children.clamp_min(0)].float()
    scale = drafted.hidden.float().norm(dim=-1).mean(dim=-1).clamp_min(1e-12)
    moved = (states[:, :, left] - states[:, :, right]).norm(dim=-1) / scale[:, None, None]
    apart = (codes[:, :, left] - codes[:, :, right]).norm(dim=-1)
    exists = children >= 0
    ratio = torch.where(exists[..., left] & exists[..., right] & (apart > 0), moved / apart, torch.nan)
    everywhere = ratio.flatten(1).nanmedian(dim=-1, keepdim=True).values
    own = ratio[..., 0] if len(left) == 1 else ratio.nanmedian(dim=-1).values
    return torch.where(own.isnan(), everywhere, own).nan_to_num(nan=torch.inf)


def total_variation(laws: Tensor) -> Tensor:
    """TV [B, n, n] of all pairs of laws [B, n, V], one row of pairs at a time: no [n, n, V] tensor."""
    rows = [(laws - laws[:, i : i + 1]).abs().sum(dim=-1) for i in range(laws.shape[1])]
    return torch.stack(rows, dim=1) / 2


def law_distance_bound(logits: Tensor) -> Tensor:
    """Certified bound tanh(d_H / 4) >= TV(p_u, p_w), [B, n, n], from the laws' logits [B, n, V] after temperature.

    d_H is the range over tokens of the difference of the logits (Hilbert's projective metric). It holds for laws that
    are not truncated.
    """
    rows = []
    for i in range(logits.shape[1]):
        apart = logits - logits[:, i : i + 1]
        rows.append(apart.amax(dim=-1) - apart.amin(dim=-1))
    return torch.tanh(torch.stack(rows, dim=1) / 4)


def convergence(alike: Tensor, tree: Tree, horizon: int) -> Tensor:
    """The largest similarity of a descendant of u and one of w at equal depth below them, 1 … horizon: [B, n, n].

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
