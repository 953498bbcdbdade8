"""Triton kernels of `fastgen.kernels.pack`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.triton_tools import cdiv, power_of_two, run_kernel, tile

Packed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _count(mask, counts, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Kept positions of a sample."""
    sample = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    kept = tl.load(mask + sample * length + place, mask=place < length, other=0)
    tl.store(counts + sample, tl.sum((kept != 0).to(tl.int32), axis=0))


@triton.jit
def _fill(  # type: ignore[no-untyped-def]
    mask, counts, scores, keep, out_mask, positions, cu_seqlens, ids, rows,
    samples, length, capacity, score_stride, score_step,
    TOP: tl.constexpr, BLOCK: tl.constexpr, SAMPLES: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One sample's part of a packing; an extra program writes the last bound. Each fills a share of the padding after
    the last token."""
    sample = tl.program_id(0)
    others = tl.arange(0, SAMPLES)
    if TOP:
        every = tl.load(keep + others, mask=others < samples, other=0)
        every = tl.minimum(tl.maximum(every, 0), length).to(tl.int32)
    else:
        every = tl.load(counts + others, mask=others < samples, other=0)
    start = tl.sum(tl.where(others < sample, every, 0), axis=0)
    kept_in_all = tl.minimum(tl.sum(every, axis=0), capacity)
    share = (capacity - kept_in_all + samples) // (samples + 1)
    last = tl.minimum(kept_in_all + (sample + 1) * share, capacity)
    for first in range(kept_in_all + sample * share, last, TAIL):
        behind = first + tl.arange(0, TAIL)
        tl.store(positions + behind, tl.full([TAIL], -1, tl.int64), mask=behind < last)
        tl.store(ids + behind, tl.zeros([TAIL], tl.int64) + (samples - 1), mask=behind < last)
    if sample == samples:
        tl.store(cu_seqlens + samples, tl.minimum(start, capacity))
    else:
        tl.store(cu_seqlens + sample, tl.minimum(start, capacity))
        place = tl.arange(0, BLOCK)
        inside = place < length
        base = sample.to(tl.int64) * length
        if TOP:
            count = tl.sum(tl.where(others == sample, every, 0), axis=0)
            value = tl.load(scores + sample.to(tl.int64) * score_stride + place * score_step, mask=inside, other=0.0)
            # An integer with the order of the floats: -0 is 0, NaN is largest, padding is smallest.
            bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
            order = tl.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits)
            order = tl.where(value != value, 0x7FFFFFFF, order)
            order = tl.where(inside, order, -0x80000000)
            # Bisect for the largest threshold with at least `count` scores at or above it; stop at exactly `count`.
            low = tl.full([], -0x80000001, tl.int64)
            high = tl.full([], 0x80000000, tl.int64)
            while high - low > 1:
                middle = (low + high) >> 1
                above = tl.sum((order >= middle.to(tl.int32)).to(tl.int32), axis=0)
                enough = above >= count
                low = tl.where(enough, middle, low)
                high = tl.where(above == count, low + 1, tl.where(enough, high, middle))
            kept = (order > low) & inside
            ties = (order == low) & inside
            larger = tl.sum(kept.to(tl.int32), axis=0)
            among = tl.cumsum(ties.to(tl.int32), axis=0)
            kept = kept | (ties & (among <= count - larger))
        else:
            kept = tl.load(mask + base + place, mask=inside, other=0) != 0
        row = start + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        kept = kept & (row < capacity)
        tl.store(out_mask + base + place, kept.to(tl.int8), mask=inside)
        tl.store(rows + base + place, tl.minimum(row, capacity - 1).to(tl.int64), mask=inside)
        tl.store(positions + row, base + place, mask=kept)
        tl.store(ids + row, tl.zeros([BLOCK], tl.int64) + sample, mask=kept)


@triton.jit
def _scatter(  # type: ignore[no-untyped-def]
    packed, mask, rows, grid, count, width, stride, step, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """grid[r] = packed[rows[r]], or zeros where nothing is kept."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < count
    at = tl.load(rows + row, mask=inside, other=-1)
    there = tl.load(mask + row, mask=inside, other=0) != 0
    fits = inside[:, None] & (column < width)[None, :]
    values = tl.load(packed + at[:, None] * stride + column[None, :] * step, mask=fits & there[:, None], other=0.0)
    tl.store(grid + row[:, None] * width + column[None, :], values, mask=fits)


def launch_mask(mask: Tensor, capacity: int) -> Packed:
    """See `fastgen.kernels.pack.pack_mask`."""
    mask = mask.contiguous()
    counts = torch.empty(len(mask), dtype=torch.int32, device=mask.device)
    if mask.numel():
        block = power_of_two(mask.shape[1])
        run_kernel(
            _count, (len(mask),), mask.view(torch.int8), counts, mask.shape[1], BLOCK=block, num_warps=_warps(block)
        )
    return _filled(mask, counts, None, None, capacity)


def launch_top(scores: Tensor, keep: Tensor, capacity: int) -> Packed:
    """See `fastgen.kernels.pack.pack_top`."""
    return _filled(None, None, scores, keep.contiguous(), capacity)


def _filled(
    mask: Tensor | None, counts: Tensor | None, scores: Tensor | None, keep: Tensor | None, capacity: int
) -> Packed:
    grid = mask if mask is not None else scores
    assert grid is not None
    samples, length = grid.shape
    out_mask = grid.new_empty(samples, length, dtype=torch.int8)
    positions, ids = (grid.new_empty(capacity, dtype=torch.int64) for _ in range(2))
    rows = grid.new_empty(samples, length, dtype=torch.int64)
    cu_seqlens = grid.new_empty(samples + 1, dtype=torch.int32)
    if not grid.numel():
        return out_mask.view(torch.bool), positions.fill_(-1), cu_seqlens.zero_(), ids.fill_(samples - 1), rows
    block = power_of_two(length)
    anything = cu_seqlens
    run_kernel(
        _fill,
        (samples + 1,),
        anything if mask is None else mask.view(torch.int8),
        anything if counts is None else counts,
        anything if scores is None else scores,
        anything if keep is None else keep,
        out_mask, positions, cu_seqlens, ids, rows, samples, length, capacity,
        0 if scores is None else scores.stride(0), 0 if scores is None else scores.stride(1),
        TOP=scores is not None, BLOCK=block, SAMPLES=power_of_two(samples), TAIL=1024,
        num_warps=_warps(block),
    )  # fmt: skip
    return out_mask.view(torch.bool), positions, cu_seqlens, ids, rows


def launch_scatter(packed: Tensor, mask: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """See `fastgen.kernels.pack.scatter`."""
    width, count = packed.shape[1], mask.numel()
    target = torch.empty((*mask.shape, width), dtype=packed.dtype, device=packed.device)
    if not target.numel():
        return target
    block, together = tile(width)
    run_kernel(
        _scatter,
        (cdiv(count, together), cdiv(width, block)),
        packed, mask.contiguous().view(torch.int8), rows.contiguous(), target, count, width, *packed.stride(),
        ROWS=together, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return target


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))
