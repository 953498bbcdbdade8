"""Sequences of different lengths, one after the other in one tensor: bookkeeping and adaptive norms by sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.adaln import adaln


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
        """Segments of sequences whose lengths are known on the host; no host synchronisation."""
        counts = torch.tensor(lengths)
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        ids = torch.repeat_interleave(torch.arange(len(lengths)), counts, output_size=sum(lengths))
        equal = lengths[0] if len(set(lengths)) == 1 else None
        return Segments(ids.to(device, non_blocking=True), starts.to(device, non_blocking=True), max(lengths), equal)


def adaptive(
    hidden: Tensor,
    segments: Segments,
    *,
    update: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`fastgen.kernels.adaln` on packed sequences.

    Args:
        hidden, update: [T, D].
        gate, scale, shift: [n, D] of the sequences.
        options: of `adaln`.

    Returns:
        hidden plus the gated update, and its modulated norm, [T, D] each.
    """
    options |= {"gate": gate, "scale": scale, "shift": shift}
    if segments.equal_length is None:
        if gate is not None or scale is not None or shift is not None:
            options |= {"sequence_ids": segments.sequence_ids, "cu_seqlens": segments.cu_seqlens}
        return adaln(hidden, update=update, **options)
    shape = (-1, segments.equal_length, hidden.shape[-1])
    grouped = None if update is None else update.view(shape)
    total, normed = adaln(hidden.view(shape), update=grouped, **options)
    return total.view(hidden.shape), normed.view(hidden.shape)
