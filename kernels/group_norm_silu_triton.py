"""Triton kernels of `fastgen.kernels.group_norm_silu`: sums by channel, their fold to one affine map, and the map."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["forward"]


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    x, sums, pixels, channels, sample_stride, pixel_stride, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Program (part, sample, channel block): sums [samples, 2, parts, channels] of x - x_0 and its square.

    x_0 is the channel's first pixel: sums of squares about zero would cancel where the mean is large.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    sample = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    x += sample * sample_stride
    origin = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    share = tl.cdiv(tl.cdiv(pixels, parts), PIXELS) * PIXELS
    start = part * share
    stop = tl.minimum(start + share, pixels)
    first = tl.zeros((PIXELS, CHANNELS), tl.float32)
    second = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for begin in range(start, stop, PIXELS):
        pixel = begin + tl.arange(0, PIXELS)
        mask = (pixel < stop)[:, None] & inside[None, :]
        value = tl.load(x + pixel.to(tl.int64)[:, None] * pixel_stride + channel[None, :], mask=mask, other=0.0)
        value = tl.where(mask, value.to(tl.float32) - origin, 0.0)
        first += value
        second += value * value
    place = sums + (sample * 2 * parts + part) * channels + channel
    tl.store(place, tl.sum(first, axis=0), mask=inside)
    tl.store(place + parts * channels, tl.sum(second, axis=0), mask=inside)


@triton.jit
def _fold(  # type: ignore[no-untyped-def]
    x,
    sums,
    weight,
    bias,
    folded,
    pixels,
    channels,
    width,
    parts,
    sample_stride,
    eps,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
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
def _apply(  # type: ignore[no-untyped-def]
    x,
    out,
    folded,
    pixels,
    channels,
    sample_stride,
    pixel_stride,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Program (pixel block, sample, channel block)."""
    sample = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    mask = (pixel < pixels)[:, None] & inside[None, :]
    place = folded + sample * 2 * channels + channel
    factor = tl.load(place, mask=inside, other=0.0)[None, :]
    shift = tl.load(place + channels, mask=inside, other=0.0)[None, :]
    value = tl.load(
        x + sample * sample_stride + pixel[:, None] * pixel_stride + channel[None, :], mask=mask, other=0.0
    )
    value = value.to(tl.float32) * factor + shift
    if SILU:
        value *= tl.sigmoid(value)
    place = out + (sample * pixels + pixel[:, None]) * channels + channel[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=mask)


def forward(
    x: Tensor, out: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> None:
    """Launch. x [n, pixels, channels] with contiguous channels, out the same and contiguous."""
    samples, pixels, channels = x.shape
    if not x.numel():
        return
    block = min(triton.next_power_of_2(channels), 512)
    together = max(1, 4096 // block)
    blocks = triton.cdiv(channels, block)
    # Enough parts for every multiprocessor, each of several blocks of pixels.
    parts = max(1, min(triton.cdiv(pixels, 2 * together), triton.cdiv(1056, samples * blocks), 512))
    sums = torch.empty((samples, 2, parts, channels), dtype=torch.float32, device=x.device)
    folded = torch.empty((samples, 2, channels), dtype=torch.float32, device=x.device)
    strides = x.stride()[:2]
    _sums[(parts, samples, blocks)](x, sums, pixels, channels, *strides, PIXELS=together, CHANNELS=block, num_warps=8)
    width = channels // groups
    _fold[(groups, samples)](
        x,
        sums,
        weight,
        bias,
        folded,
        pixels,
        channels,
        width,
        parts,
        strides[0],
        eps,
        PARTS=triton.next_power_of_2(parts),
        WIDTH=triton.next_power_of_2(width),
        num_warps=4,
    )
    _apply[(triton.cdiv(pixels, together), samples, blocks)](
        x, out, folded, pixels, channels, *strides, SILU=silu, PIXELS=together, CHANNELS=block, num_warps=8
    )
