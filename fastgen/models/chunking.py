"""Elastic chunking of a token grid (DC-DiT, arXiv 2603.06351): which positions stay, packed, and the ratio loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fastgen.checks import check_integer
from fastgen.errors import FastgenError
from fastgen.kernels.pack import Packing, pack_top
from fastgen.models.packing import Segments

THRESHOLD = 0.5
"""A position with a boundary probability above it belongs to the natural set."""

TailDrop: TypeAlias = float | Sequence[float] | Tensor
TokenBudget: TypeAlias = int | Sequence[int]


@dataclass(frozen=True, slots=True)
class Chunks:
    """Kept positions of n samples on a grid of L = H W positions.

    Attributes:
        grid: (H, W).
        probabilities: float32 [n, L], boundary probabilities.
        natural: bool [n, L], positions with a probability above one half, before anything is dropped.
        mask: bool [n, L], kept positions.
        positions: int64 [T], sample * L + index of the kept positions, ascending.
        rows: int64 [n, L], kept positions at or before each one, less one: at a kept position its packed row.
        segments: how the T kept tokens divide into samples.
        lengths: kept tokens of each sample, on the host.
    """

    grid: tuple[int, int]
    probabilities: Tensor
    natural: Tensor
    mask: Tensor
    positions: Tensor
    rows: Tensor
    segments: Segments
    lengths: tuple[int, ...]

    @property
    def samples(self) -> int:
        return len(self.lengths)

    @property
    def packing(self) -> Packing:
        """The kept positions, for `fastgen.kernels.pack`."""
        segments = self.segments
        return Packing(self.mask, self.positions, segments.cu_seqlens, segments.sequence_ids, self.rows, full=True)

    @property
    def grid_size(self) -> int:
        """L, positions of the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def kept_fraction(self) -> float:
        """Share of all positions that is kept."""
        return sum(self.lengths) / (self.samples * self.grid_size)


def check_budget(
    tail_drop: TailDrop | None, token_budget: TokenBudget | None, samples: int, length: int
) -> tuple[Tensor, TokenBudget | None]:
    """Validate the knobs.

    Args:
        tail_drop: rho in [0, 1), one number or one per sample; None is 0.
        token_budget: exact number of tokens to keep in each sample, 1 … L, one number or one per sample.
        samples, length: n and L.

    Returns:
        rho, float64 [n] on the CPU, and the budget.

    Raises:
        ValueError: a value out of range, a list of another length, or both knobs together.
    """
    if token_budget is not None:
        budgets = token_budget if isinstance(token_budget, Sequence) else [token_budget] * samples
        for budget in budgets:
            check_integer("token_budget", budget, 1, length)
        if len(budgets) != samples:
            raise FastgenError(f"token_budget: needs one number or {samples}, one per sample; got {len(budgets)}")
    if tail_drop is None:
        return torch.zeros(samples, dtype=torch.float64, device="cpu"), token_budget
    try:
        rho = torch.as_tensor(tail_drop, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise FastgenError(f"tail_drop: needs a number in [0, 1) or one per sample, got {tail_drop!r}") from error
    if rho.ndim == 0:
        rho = rho.expand(samples)
    if rho.shape != (samples,):
        raise FastgenError(f"tail_drop: needs one number or {samples}, one per sample; got shape {tuple(rho.shape)}")
    if not bool(((rho >= 0) & (rho < 1)).all()):
        raise FastgenError(f"tail_drop: needs numbers in [0, 1), got {tail_drop!r}")
    if token_budget is not None and bool((rho != 0).any()):
        raise FastgenError(f"token_budget and tail_drop exclude each other, got {token_budget} and {tail_drop}")
    return rho, token_budget


def select_chunks(
    probabilities: Tensor,
    grid: tuple[int, int],
    tail_drop: TailDrop | None = None,
    token_budget: TokenBudget | None = None,
    floor: float = 0.0,
) -> Chunks:
    """Elastic chunking (section 4): the likeliest boundary tokens of each sample.

    The natural set B holds the positions with p > 0.5. Tail dropping removes the floor(rho |B|) least likely of them;
    of an empty B the single likeliest position stays. A token budget K keeps exactly the K likeliest positions. Ties
    go to the lowest index, so a sample's tokens do not depend on what else is in the batch.

    One synchronisation with the device, none with a token budget.

    Args:
        probabilities: float32 [n, L].
        grid: (H, W) with H * W = L.
        tail_drop, token_budget: see `check_budget`.
        floor: least share of a sample's positions to keep, whatever the natural set and the tail drop say.

    Raises:
        ValueError: see `check_budget`; a token budget below the floor; or shapes that do not fit.
    """
    if probabilities.ndim != 2 or probabilities.shape[1] != grid[0] * grid[1] or probabilities.numel() == 0:
        raise ValueError(f"probabilities: need [n, {grid[0]} * {grid[1]}], got {tuple(probabilities.shape)}")
    samples, length = probabilities.shape
    rho, token_budget = check_budget(tail_drop, token_budget, samples, length)
    least = max(1, math.ceil(floor * length - 1e-9))
    device = probabilities.device
    natural = probabilities > THRESHOLD
    if token_budget is None:
        size = natural.sum(dim=1)
        # In float64, and with a hair's breadth for products like 0.29 * 100 that fall just short of the integer.
        dropped = (rho.to(device) * size + 1e-9).floor().long()
        keep = (size - dropped).clamp(min=least)
        lengths = tuple(keep.tolist())
    else:
        lengths = tuple(token_budget) if isinstance(token_budget, Sequence) else (token_budget,) * samples
        if min(lengths) < least:
            raise ValueError(
                f"token_budget: {min(lengths)} is below the floor, {least} of {length} tokens ({floor:.3g})"
            )
        keep = torch.tensor(lengths, device=device)
    # The number of kept tokens is known, so that the device need not be asked for it.
    packing = pack_top(probabilities.float(), keep, sum(lengths), full=True)
    equal = lengths[0] if len(set(lengths)) == 1 else None
    segments = Segments(packing.sequence_ids, packing.cu_seqlens, max(lengths), equal)
    return Chunks(grid, probabilities, natural, packing.mask, packing.positions, packing.rows, segments, lengths)


def ratio_loss(probabilities: Tensor, natural: Tensor, compression: float = 4.0, group: int = 16) -> Tensor:
    """Pulls the natural kept ratio to 1 / N (section 7): N / (N - 1) ((1 - r)(1 - p) + (N - 1) r p).

    r is the share of natural positions and p the mean probability over groups of `group` samples; the loss is the mean
    over groups. Only p carries a gradient.

    Args:
        probabilities: [n, L].
        natural: bool [n, L], before tail dropping.
        compression: N > 1.
        group: samples of a group; the last group may be smaller.

    Raises:
        ValueError: N <= 1 or an empty group.
    """
    if compression <= 1 or group < 1:
        raise ValueError(f"ratio_loss: needs compression > 1 and group >= 1, got {compression} and {group}")
    losses = []
    for p, m in zip(probabilities.split(group), natural.split(group), strict=True):
        mean_p, ratio = p.mean(), m.float().mean()
        pull = (1 - ratio) * (1 - mean_p) + (compression - 1) * ratio * mean_p
        losses.append(pull * len(p) / len(probabilities))
    return torch.stack(losses).sum() * compression / (compression - 1)


def straight_through(value: Tensor) -> Tensor:
    """1 in the forward pass, the gradient of `value` in the backward pass."""
    return value + (1 - value).detach()


def confidence(chunks: Chunks) -> Tensor:
    """c [n, L]: p where a position is kept, 1 - p where it is dropped (H-Net's confidence of the decision)."""
    p = chunks.probabilities
    return torch.where(chunks.mask, p, 1 - p)
