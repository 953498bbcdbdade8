"""The training pass of an EAGLE drafter: all positions at once, several steps of drafting on its own output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.drafters.eagle import EagleDrafter

__all__ = ["unroll"]


def unroll(
    drafter: EagleDrafter, features: Tensor, embeds: Tensor, positions: Tensor, mask: Tensor, steps: int
) -> list[Tensor]:
    """States after 1 … `steps` steps of drafting (EAGLE-3's training-time test).

    At step k, place t has the state of a node at depth k whose root is at place t - k: it reads the drafter's output
    of step k - 1 at place t - 1. It sees the committed entries up to its root, and its k ancestors.

    Args:
        drafter: to train.
        features: [R, L, F], of the target, at each place.
        embeds: [R, L, D], the target's embedding of the token after each place.
        positions: [R, L], of the places.
        mask: [R, L] bool, real places.
        steps: drafting steps; 1 is teacher forcing.

    Returns:
        [R, L, D] each; those of step k are valid from the k-th real place on.
    """
    length = features.shape[1]
    order = torch.arange(length, device=features.device)
    rotary = drafter.rotary(positions, features.dtype)
    committed: tuple[Tensor, Tensor] | None = None
    drafted: list[tuple[Tensor, Tensor]] = []
    states: list[Tensor] = []
    hidden = drafter.read(features)
    for step in range(steps):
        if step:
            before = F.pad(states[-1][:, :-1], (0, 0, 1, 0))
            hidden = before if drafter.config.variant == 3 else drafter.read(before)
        stream, query, key, value = drafter.project(embeds, hidden, rotary)
        if committed is None:
            committed = (key, value)
        else:
            drafted.append((key, value))
        # Padding sees itself, so that nothing is undefined; from the second step every place has drafted entries.
        own = torch.eye(length, dtype=torch.bool, device=mask.device) & ~mask[:, None]
        reach = ((order[:, None] - step >= order) & mask[:, None]) | own
        mixed = _attend(query, committed, drafted, reach)
        states.append(drafter.finish(stream, mixed))
    return states


def _attend(
    query: Tensor, committed: tuple[Tensor, Tensor], drafted: list[tuple[Tensor, Tensor]], reach: Tensor
) -> Tensor:
    """Attention [R, L, heads, d] over committed entries within `reach` [R, L, L], and at place t over drafted entries
    of steps 1 … k at places t - k + 1 … t."""
    scale = query.shape[-1] ** -0.5
    scores = torch.einsum("rthd,rshd->rhts", query, committed[0]) * scale
    scores = scores.masked_fill(~reach[:, None], -torch.inf)
    steps = len(drafted)
    own = []
    for j, (key, _) in enumerate(drafted, start=1):
        ahead = _shift(key, steps - j)
        own.append((query * ahead).sum(dim=-1).transpose(1, 2)[..., None] * scale)
    weights = torch.cat([scores, *own], dim=-1).softmax(dim=-1)
    length = query.shape[1]
    mixed = torch.einsum("rhts,rshd->rthd", weights[..., :length], committed[1])
    for j, (_, value) in enumerate(drafted, start=1):
        part = weights[..., length + j - 1].transpose(1, 2)[..., None]
        mixed = mixed + part * _shift(value, steps - j)
    return mixed


def _shift(values: Tensor, back: int) -> Tensor:
    """Shift values [R, L, …] by `back` places, with zeros before the first."""
    if back == 0:
        return values
    return F.pad(values[:, :-back], (0, 0, 0, 0, back, 0))
