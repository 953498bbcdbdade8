"""Reference implementation of attention of tree nodes, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.kernels.cached_attention import cached_attention

__all__ = ["tree_attention_reference", "tree_mask"]


def tree_attention_reference(
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
) -> Tensor:
    """Reference implementation of `tree_attention`: one attention with a mask over all slots."""
    return cached_attention(query, key, value, store, layer, slots, tree_mask(lengths, visible, tree, limit))


def tree_mask(lengths: Tensor, visible: Tensor, tree: Tensor, limit: int) -> Tensor:
    """Attention mask, bool [R, 1, n, limit]: every node sees its row's committed slots, its ancestors and itself.

    Arguments: see `tree_attention`.
    """
    rows, n, m = len(lengths), *tree.shape[-2:]
    slot = torch.arange(limit, device=tree.device)
    committed = (slot < lengths[:, None]) & visible[:, :limit]
    node = slot - lengths[:, None]
    inside = (node >= 0) & (node < m)
    index = node.clamp(0, m - 1)[:, None, :].expand(rows, n, limit)
    among = tree.expand(rows, n, m).gather(2, index) & inside[:, None]
    return (committed[:, None] | among)[:, None]
