"""Reference implementation of packing, in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Packing", "pack_mask_reference", "pack_top_reference", "scatter_reference"]


@dataclass(frozen=True, slots=True)
class Packing:
    """Which of the L positions of n samples are kept, and their rows in the packed tensor.

    Attributes:
        mask: bool [n, L], kept positions.
        positions: int64 [capacity], sample * L + index of the kept positions, ascending; -1 after the last.
        cu_seqlens: int32 [n + 1], start of each sample in the packed tensor, and the number of kept tokens.
        sequence_ids: int64 [capacity], sample of each token; n - 1 after the last.
        rows: int64 [n, L], number of kept positions up to each one, minus one: the row of a kept position.
        full: whether the host knows that there is no padding after the last token.
    """

    mask: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    sequence_ids: Tensor
    rows: Tensor
    full: bool

    @property
    def capacity(self) -> int:
        """Rows of the packed tensor."""
        return len(self.positions)


def pack_mask_reference(mask: Tensor, capacity: int, full: bool = False) -> Packing:
    """Reference implementation of `pack_mask`."""
    samples, length = mask.shape
    rows = mask.flatten().cumsum(0) - 1
    if not full and mask.numel():  # drop what exceeds the capacity
        mask = mask & (rows < capacity).view_as(mask)
        rows = rows.clamp_max(capacity - 1)
    positions = torch.nonzero_static(mask.flatten(), size=capacity, fill_value=-1).squeeze(1)
    ends = rows.view(samples, length)[:, -1] + 1 if length else rows.new_zeros(samples)
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
    ids = positions // max(length, 1)
    if not full:
        ids = torch.where(positions >= 0, ids, samples - 1)
    return Packing(mask, positions, cu_seqlens, ids, rows.view(samples, length), full)


def pack_top_reference(scores: Tensor, keep: Tensor, capacity: int, full: bool = False) -> Packing:
    """Reference implementation of `pack_top`; keep int64 [n]."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    mask = torch.empty_like(order).scatter_(1, order, places) < keep[:, None]
    return pack_mask_reference(mask, capacity, full)


def scatter_reference(packed: Tensor, packing: Packing) -> Tensor:
    """Reference implementation of `scatter`."""
    samples, length = packing.mask.shape
    grid = packed.new_zeros(samples * length, packed.shape[1])
    if packing.full:
        return grid.index_copy(0, packing.positions, packed).view(samples, length, -1)
    rows = packing.rows.clamp_min(0).flatten()
    if not packing.capacity:
        return grid.view(samples, length, -1)
    return torch.where(packing.mask.flatten()[:, None], packed.index_select(0, rows), grid).view(samples, length, -1)
