"""How alike the target finds two nodes of a tree: similarity of their hidden states or laws, and convergence below."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastgen.drafters.tree import Tree
from fastgen.drafters.verify import Drafted

__all__ = ["Similarity", "convergence", "law_distance_bound", "similarity", "total_variation"]

Similarity = Literal["cosine", "l2", "tv"]


def similarity(drafted: Drafted, kind: Similarity) -> Tensor:
    """Similarity [B, n, n] of all pairs of nodes, at most 1 (equal).

    "cosine" centres the hidden states first: raw ones all point one way. "l2" is 1 - |g_u - g_w| / |g_u|, made
    symmetric by the larger norm. "tv" is 1 - TV(p_u, p_w).

    Raises:
        ValueError: the drafted tree has no hidden states, and `kind` needs them.
    """
    if kind == "tv":
        return 1 - total_variation(drafted.target)
    if drafted.hidden is None:
        raise ValueError(f"similarity: {kind!r} needs the target's hidden states")
    states = drafted.hidden.float()
    if kind == "cosine":
        centred = torch.nn.functional.normalize(states - states.mean(dim=1, keepdim=True), dim=-1)
        return centred @ centred.mT
    norms = states.norm(dim=-1)
    largest = torch.maximum(norms[:, :, None], norms[:, None, :]).clamp_min(1e-12)
    return 1 - torch.cdist(states, states) / largest


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
