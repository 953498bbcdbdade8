"""Triton kernels of `fastgen.kernels.group_norm_silu`: sums by channel, one affine map from them, and the map."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.triton_tools import cdiv, power_of_two, run_kernel

__all__ = ["forward"]

_SMALL = 2**12  # elements of a group that one program processes: launches dominate


@triton.jit
def _add(first, second, x, origin, pixel, pixels, channel, inside, pixel_stride):  # type: ignore[no-untyped-def]
    """Add a tile of x - origin and its square to the sums [PIXELS, CHANNELS]."""
    mask = (pixel < pixels)[:, None] & inside[None, :]
    value = tl.load(x + pixel.to(tl.int64)[:, None] * pixel_stride + channel[None, :], mask=mask, other=0.0)
    value = tl.where(mask, value.to(tl.float32) - origin, 0.0)
    return first + value, second + value * value


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    x, sums, pixels, channels, sample_stride, pixel_stride, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Program (part, sample, channel block): sums [samples, 2, parts, channels] of x - x_0 and its square.

    x_0 is the channel's first pixel: with a large mean, sums of squares about zero would cancel. The parts interleave,
    so that they advance through the image together and its end stays in the cache.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    sample = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    x += sample * sample_stride
    origin = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    # Four tiles at once, so that their loads overlap.
    a1 = tl.zeros((PIXELS, CHANNELS), tl.float32)
    a2 = tl.zeros((PIXELS, CHANNELS), tl.float32)
    b1 = tl.zeros((PIXELS, CHANNELS), tl.float32)
    b2 = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for begin in range(part * 4 * PIXELS, pixels, parts * 4 * PIXELS):
        pixel = begin + tl.arange(0, PIXELS)
        a1, a2 = _add(a1, a2, x, origin, pixel, pixels, channel, inside, pixel_stride)
        b1, b2 = _add(b1, b2, x, origin, pixel + PIXELS, pixels, channel, inside, pixel_stride)
        a1, a2 = _add(a1, a2, x, origin, pixel + 2 * PIXELS, pixels, channel, inside, pixel_stride)
        b1, b2 = _add(b1, b2, x, origin, pixel + 3 * PIXELS, pixels, channel, inside, pixel_stride)
    place = sums + (sample * 2 * parts + part) * channels + channel
    tl.store(place, tl.sum(a1 + b1, axis=0), mask=inside)
    tl.store(place + parts * channels, tl.sum(a2 + b2, axis=0), mask=inside)


@triton.jit
def _fold(  # type: ignore[no-untyped-def]
    x, sums, weight, bias, folded, pixels, channels, width, parts, sample_stride, eps,
    PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (group, sample): the group's norm and its affine map as folded [samples, 2, channels], float32."""
    group = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    channel = group * width + column
    part = tl.arange(0, PARTS)
    mask = (part < parts)[:, None] & inside[None, :]
    place = sums + (sample * 2 * parts + part[:, None]) * channels + channel[None, :]
    first = tl.sum(tl.load(place, mask=mask, other=0.0), axis=0)
    second = tl.sum(tl.load(place + parts * channels, mask=mask, other=0.0), axis=0)
    origin = tl.load(x + sample * sample_stride + channel, mask=inside, other=0.0).to(tl.float32)
    offset = first / pixels
    average = tl.where(inside, origin + offset, 0.0)
    mean = tl.sum(average, axis=0) / width
    # Within channels, and between their means (Chan's formula).
    within = tl.sum(tl.where(inside, second - first * offset, 0.0), axis=0)
    apart = tl.where(inside, average - mean, 0.0)
    variance = (within / pixels + tl.sum(apart * apart, axis=0)) / width
    factor = tl.full((WIDTH,), 1.0, tl.float32) * tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    if weight is not None:
        factor *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    shift = -mean * factor
    if bias is not None:
        shift += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    place = folded + sample * 2 * channels + channel
    tl.store(place, factor, mask=inside)
    tl.store(place + channels, shift, mask=inside)


@triton.jit
def _map(x, out, factor, shift, pixel, pixels, channel, inside, channels, pixel_stride, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tile: x * factor + shift, and SiLU."""
    mask = (pixel < pixels)[:, None] & inside[None, :]
    value = tl.load(x + pixel[:, None] * pixel_stride + channel[None, :], mask=mask, other=0.0)
    value = value.to(tl.float32) * factor + shift
    if SILU:
        value *= tl.sigmoid(value)
    tl.store(out + pixel[:, None] * channels + channel[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _apply(  # type: ignore[no-untyped-def]
    x, out, folded, pixels, channels, sample_stride, pixel_stride,
    SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program (pixel block, sample, channel block), last block first: it was read last and may be in the cache."""
    sample = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    block = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    pixel = block * (TILES * PIXELS) + tl.arange(0, PIXELS)
    place = folded + sample * 2 * channels + channel
    factor = tl.load(place, mask=inside, other=0.0)[None, :]
    shift = tl.load(place + channels, mask=inside, other=0.0)[None, :]
    x += sample * sample_stride
    out += sample * pixels * channels
    for tile in tl.static_range(TILES):
        _map(x, out, factor, shift, pixel + tile * PIXELS, pixels, channel, inside, channels, pixel_stride, SILU)


@triton.jit
def _whole(  # type: ignore[no-untyped-def]
    x, out, weight, bias, pixels, channels, width, sample_stride, pixel_stride, eps,
    SILU: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (group, sample): a whole group in one launch, for small images, where launches dominate."""
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    channel = tl.program_id(0) * width + column
    x += sample * sample_stride
    out += sample * pixels * channels
    origin = tl.load(x + tl.program_id(0) * width).to(tl.float32)
    first = tl.zeros((PIXELS, WIDTH), tl.float32)
    second = tl.zeros((PIXELS, WIDTH), tl.float32)
    for begin in range(0, pixels, PIXELS):
        pixel = begin + tl.arange(0, PIXELS)
        first, second = _add(first, second, x, origin, pixel, pixels, channel, inside, pixel_stride)
    count = pixels * width
    offset = tl.sum(tl.sum(first, axis=1), axis=0) / count
    variance = tl.sum(tl.sum(second, axis=1), axis=0) / count - offset * offset
    factor = tl.full((WIDTH,), 1.0, tl.float32) * tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    if weight is not None:
        factor *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    shift = -(origin + offset) * factor
    if bias is not None:
        shift += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for begin in range(0, pixels, PIXELS):
        pixel = begin + tl.arange(0, PIXELS).to(tl.int64)
        _map(x, out, factor[None, :], shift[None, :], pixel, pixels, channel, inside, channels, pixel_stride, SILU)


class _Plan(NamedTuple):
    """Launches of one image: tiles of `pixels` x `channels`, `parts` of the sums, `tiles` per program of the map."""

    pixels: int
    channels: int
    parts: int
    tiles: int
    warps: int


def _plan(samples: int, pixels: int, channels: int) -> _Plan:
    block = min(power_of_two(channels), 512)
    together = max(1, 2048 // block)
    blocks = cdiv(channels, block)
    # Two programs per multiprocessor of a large GPU, and no more parts than tiles.
    parts = max(1, min(cdiv(pixels, 4 * together), cdiv(264, samples * blocks)))
    tiles = 4 if pixels * samples * blocks >= 4 * 1056 * together else 1
    return _Plan(together, block, parts, tiles, 4)


def forward(
    x: Tensor, out: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> None:
    """Launch. x [n, pixels, channels] with contiguous channels, out the same and contiguous."""
    samples, pixels, channels = x.shape
    if not x.numel():
        return
    width = channels // groups
    strides = x.stride()[:2]
    padded = power_of_two(width)
    if pixels * padded <= _SMALL:
        together = max(1, min(power_of_two(pixels), 4096 // padded))
        run_kernel(
            _whole,
            (groups, samples),
            x, out, weight, bias, pixels, channels, width, *strides, float(eps),
            SILU=silu, PIXELS=together, WIDTH=padded, num_warps=8,
        )  # fmt: skip
        return
    together, block, parts, tiles, warps = _plan(samples, pixels, channels)
    blocks = cdiv(channels, block)
    sums = torch.empty((samples, 2, parts, channels), dtype=torch.float32, device=x.device)
    folded = torch.empty((samples, 2, channels), dtype=torch.float32, device=x.device)
    run_kernel(
        _sums,
        (parts, samples, blocks),
        x, sums, pixels, channels, *strides,
        PIXELS=together, CHANNELS=block, num_warps=warps,
    )  # fmt: skip
    run_kernel(
        _fold,
        (groups, samples),
        x, sums, weight, bias, folded, pixels, channels, width, parts, strides[0], float(eps),
        PARTS=power_of_two(parts), WIDTH=padded, num_warps=8,
    )  # fmt: skip
    run_kernel(
        _apply,
        (cdiv(pixels, tiles * together), samples, blocks),
        x, out, folded, pixels, channels, *strides,
        SILU=silu, PIXELS=together, CHANNELS=block, TILES=tiles, num_warps=warps,
    )  # fmt: skip
