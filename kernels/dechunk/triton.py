"""Triton kernels of `fastgen.kernels.dechunk`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.triton_tools import cdiv, power_of_two, precise, run_kernel

_FLOOR = 1e-19
"""Smaller Gaussian weights are ignored: a token's own weight is at least 1e-12, and float32 has seven digits."""


@triton.jit
def _nearest(  # type: ignore[no-untyped-def]
    mask, rows, nearest, height, width,
    ROWS: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Nearest kept position of `BLOCK` positions of one row of a grid: by columns first, then across them."""
    KEY: tl.constexpr = tl.int64 if WIDE else tl.int32
    LAST: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    line = tl.program_id(0).to(tl.int64)  # sample * H + row
    sample, row = line // height, (line % height).to(tl.int32)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    far = 2 * (height + width)
    gap = tl.full([COLUMNS], far, tl.int32)
    best = tl.zeros([COLUMNS], tl.int32)
    grid = mask + sample * height * width
    for other in range(0, height):
        kept = tl.load(grid + other * width + column, mask=inside, other=0) != 0
        away = tl.abs(other - row)
        closer = kept & (away < gap)  # of equally distant rows the first one stays
        gap = tl.where(closer, away, gap)
        best = tl.where(closer, other, best)
    size = height * width
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    across = place[:, None] - column[None, :]
    # Squared distance first, index second.
    key = (across * across + (gap * gap)[None, :]).to(KEY) * size + (best * width + column)[None, :]
    key = tl.where((gap < far)[None, :], key, LAST)
    least = tl.min(key, axis=1)
    index = tl.where(least == LAST, 0, least % size).to(tl.int64)
    if ROWS:
        index = tl.load(rows + sample * size + index, mask=place < width, other=0)
    tl.store(nearest + line * width + place, index, mask=place < width)


@triton.jit
def _band(  # type: ignore[no-untyped-def]
    tokens, positions, probabilities, rows, out,
    count, width, stride, step, out_stride, height, columns, reach, sigma, tiny, beyond,
    SMOOTH: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, OTHERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`ROWS` kept tokens: SMOOTH mixes them by confidence; otherwise the plain sum G h, in float32."""
    size = height * columns
    falloff = -0.5 / (sigma * sigma)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(positions + row, mask=row < count, other=-1).to(tl.int32)
    valid = place >= 0
    sample = tl.where(valid, place // size, -1)
    i, j = (place % size) // columns, place % columns
    sure = tl.full([ROWS], 1.0, tl.float32)
    lines = reach
    if SMOOTH:
        sure = tl.load(probabilities + row, mask=(row < count) & valid, other=1.0)
        # A token's own weight is its probability; lines that together weigh less than 1e-8 of it are skipped.
        least = tl.min(tl.maximum(sure, tiny), axis=0)
        lines = tl.minimum(reach, (sigma * tl.sqrt(2 * tl.log(beyond / least))).to(tl.int32) + 1)
    # Kept tokens are in raster order: those on lines within reach are contiguous.
    last = tl.max(place, axis=0)
    first = tl.min(tl.where(valid, place, last), axis=0)
    begin, end = 0, 0
    if last >= 0:
        above = (first // size) * size + tl.maximum((first % size) // columns - lines, 0) * columns
        below = (last // size) * size + (tl.minimum((last % size) // columns + lines, height - 1) + 1) * columns
        begin = tl.load(rows + above - 1, mask=above > 0, other=-1).to(tl.int32) + 1
        end = tl.load(rows + below - 1).to(tl.int32) + 1
    mass = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(begin, end, OTHERS):
        other = start + tl.arange(0, OTHERS)
        inside = other < end
        at = tl.load(positions + other, mask=inside, other=0).to(tl.int32)
        down = i[:, None] - ((at % size) // columns)[None, :]
        across = j[:, None] - (at % columns)[None, :]
        weight = tl.exp((down * down + across * across).to(tl.float32) * falloff)
        if SMOOTH:
            p = tl.load(probabilities + other, mask=inside, other=0.0)
            weight = weight * tl.maximum(p, tiny)[None, :]
        weight = tl.where(inside[None, :] & (sample[:, None] == (at // size)[None, :]), weight, 0.0)
        mass += tl.sum(weight, axis=1)
        hidden = tl.load(
            tokens + other.to(tl.int64)[:, None] * stride + channel[None, :] * step,
            mask=inside[:, None] & (channel < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        mixed = tl.dot(weight, hidden, mixed, input_precision=PRECISION)
    fits = (row < count)[:, None] & (channel < width)[None, :]
    long = row.to(tl.int64)
    if SMOOTH:
        own = tl.load(
            tokens + long[:, None] * stride + channel[None, :] * step, mask=fits & valid[:, None], other=0.0
        ).to(tl.float32)
        mixed = sure[:, None] * own + (1 - sure[:, None]) * (mixed / tl.where(mass > 0, mass, 1.0)[:, None])
        mixed = tl.where(valid[:, None], mixed, 0.0)
    tl.store(out + long[:, None] * out_stride + channel[None, :], mixed.to(out.dtype.element_ty), mask=fits)


def launch_nearest(mask: Tensor, rows: Tensor | None = None) -> Tensor:
    """See `fastgen.kernels.dechunk.nearest_kept`."""
    samples, height, width = mask.shape
    nearest = torch.empty(mask.shape, dtype=torch.int64, device=mask.device)
    if mask.numel():
        block, columns = min(32, power_of_two(width)), power_of_two(width)
        wide = ((height - 1) ** 2 + (width - 1) ** 2 + 1) * height * width >= 2**31
        grid = (samples * height, cdiv(width, block))
        run_kernel(
            _nearest,
            grid,
            mask.contiguous().view(torch.int8), nearest if rows is None else rows.contiguous(), nearest, height, width,
            ROWS=rows is not None, WIDE=wide, COLUMNS=columns, BLOCK=block,
        )  # fmt: skip
    return nearest


def launch_smooth(
    tokens: Tensor, positions: Tensor, probabilities: Tensor, rows: Tensor, height: int, width: int, sigma: float
) -> Tensor:
    """See `fastgen.kernels.dechunk.smooth_kept`."""
    out = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    return _banded(tokens, positions, probabilities.contiguous(), rows, out, height, width, sigma, True)


def launch_blur(values: Tensor, positions: Tensor, rows: Tensor, height: int, width: int, sigma: float) -> Tensor:
    """G values, float32 [T, C]: kept tokens' values mixed by the Gaussian of their distances."""
    out = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    return _banded(values, positions, None, rows, out, height, width, sigma, False)


def _band_plan(count: int, channels: int) -> tuple[int, int, int, int]:
    """Tokens per program, tokens that it reads at once, channels and warps."""
    most = 256 if cdiv(count, 32) * cdiv(channels, 256) >= 1056 else 128
    return 32, 32, min(most, max(16, power_of_two(channels))), 4


def _banded(
    values: Tensor, positions: Tensor, p: Tensor | None, rows: Tensor, out: Tensor,
    height: int, width: int, sigma: float, smooth: bool,
) -> Tensor:  # fmt: skip
    if not out.numel():
        return out
    count, channels = values.shape
    reach = min(height, math.ceil(sigma * math.sqrt(-2 * math.log(_FLOOR))))
    several, others, block, warps = _band_plan(count, channels)
    # tf32's ten bits are fewer than float16's precision needs, but enough for bfloat16.
    precision = "tf32" if values.dtype == torch.bfloat16 else precise()
    run_kernel(
        _band,
        (cdiv(count, several), cdiv(channels, block)),
        values, positions.contiguous(), rows if p is None else p, rows.contiguous(), out,
        count, channels, *values.stride(), out.stride(0), height, width, reach, float(sigma), 1e-12,
        2 * math.pi * (sigma**2 + 1) * 1e8,
        SMOOTH=smooth, PRECISION=precision, ROWS=several, OTHERS=others, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return out
