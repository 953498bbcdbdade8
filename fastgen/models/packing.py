"""Sequences of different lengths, one after the other in one tensor: bookkeeping and per-sequence modulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """How a packed tensor [T, ...] divides into n sequences.

    Attributes:
        sequence_ids: int64 [T], sequence of each token.
        cu_seqlens: int32 [n + 1], start of each sequence and T.
        max_seqlen: length of the longest sequence.
        equal_length: length of every sequence when all are equal, else None.
    """

    sequence_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    equal_length: int | None

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> Segments:
        """Segments of sequences whose lengths are known on the host: nothing is asked of the device."""
        counts = torch.tensor(lengths)
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        ids = torch.repeat_interleave(torch.arange(len(lengths)), counts, output_size=sum(lengths))
        equal = lengths[0] if len(set(lengths)) == 1 else None
        return Segments(ids.to(device, non_blocking=True), starts.to(device, non_blocking=True), max(lengths), equal)


def modulate(hidden: Tensor, shift: Tensor | None, scale: Tensor, segments: Segments) -> Tensor:
    """hidden [T, D] * (1 + scale) + shift, with scale and shift (None is zero) [n, D] of each token's sequence."""
    if shift is None:
        if segments.equal_length is not None:
            grouped = hidden.view(-1, segments.equal_length, hidden.shape[-1])
            return (grouped * (1 + scale[:, None])).view(hidden.shape)
        return hidden * (1 + scale.index_select(0, segments.sequence_ids))
    if segments.equal_length is not None:
        grouped = hidden.view(-1, segments.equal_length, hidden.shape[-1])
        return torch.addcmul(shift[:, None], grouped, 1 + scale[:, None]).view(hidden.shape)
    ids = segments.sequence_ids
    return torch.addcmul(shift.index_select(0, ids), hidden, 1 + scale.index_select(0, ids))


def gated_sum(hidden: Tensor, gate: Tensor, update: Tensor, segments: Segments) -> Tensor:
    """hidden + gate * update, both [T, D], with gate [n, D] of each token's sequence."""
    if segments.equal_length is not None:
        shape = (-1, segments.equal_length, hidden.shape[-1])
        return torch.addcmul(hidden.view(shape), gate[:, None], update.view(shape)).view(hidden.shape)
    return torch.addcmul(hidden, gate.index_select(0, segments.sequence_ids), update)
