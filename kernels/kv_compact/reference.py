"""Reference implementation of moving accepted paths, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kv_compact_reference"]


def kv_compact_reference(store: Tensor, lengths: Tensor, nodes: Tensor, count: Tensor) -> None:
    """Reference implementation of `kv_compact`."""
    capacity = store.shape[3]
    if not nodes.numel() or not capacity:
        return
    rows = torch.arange(len(nodes), device=nodes.device)[:, None]
    start, place = lengths[:, None], torch.arange(nodes.shape[1], device=nodes.device)
    source, target = start + nodes, start + place
    moves = (place < count[:, None]) & (source >= 0) & (source < capacity) & (target >= 0) & (target < capacity)
    # Nodes that do not move repeat the first node's move, or leave its slot unchanged.
    first = torch.where(moves[:, :1], nodes[:, :1], 0)
    source = torch.where(moves, source, (start + first).clamp(0, capacity - 1))
    target = torch.where(moves, target, start.clamp(0, capacity - 1))
    taken = store[:, :, rows, source]
    store[:, :, rows, target] = taken
