"""Triton kernels of `fastgen.kernels.adaln`: each row of the residual stream is read once and written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.triton_tools import cdiv, power_of_two, run_kernel

__all__ = ["backward", "forward"]

NORMS = {"none": 0, "layer": 1, "rms": 2}


@triton.jit
def _offset(row, length, outer, inner):  # type: ignore[no-untyped-def]
    """Offset of row `row` of [n, length, D], in elements."""
    return (row // length) * outer + (row % length) * inner


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    hidden, update, gate, scale, shift, weight, bias, update_weight, ids, summed, normed, rows, length, samples,
    width, hidden_outer, hidden_inner, update_outer, update_inner, gate_stride, scale_stride, shift_stride, eps,
    update_eps,
    NORM: tl.constexpr, UPDATE_NORM: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = row < rows
    inside = column < width
    # Graph compilers pass 64-bit numbers.
    eps = tl.full([], eps, tl.float32)
    update_eps = tl.full([], update_eps, tl.float32)
    mask = there[:, None] & inside[None, :]
    sample = row // length
    if ids is not None:
        sample = tl.load(ids + row, mask=there, other=0).to(tl.int64)
        sample = tl.minimum(tl.maximum(sample, 0), samples - 1)

    place = _offset(row, length, hidden_outer, hidden_inner)[:, None] + column[None, :]
    x = tl.load(hidden + place, mask=mask, other=0.0).to(tl.float32)
    if update is not None:
        place = _offset(row, length, update_outer, update_inner)[:, None] + column[None, :]
        u = tl.load(update + place, mask=mask, other=0.0).to(tl.float32)
        if UPDATE_NORM:
            u *= tl.rsqrt(tl.sum(u * u, axis=1) / width + update_eps)[:, None]
            if update_weight is not None:
                u *= tl.load(update_weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if gate is not None:
            g = tl.load(gate + sample[:, None] * gate_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
            if TANH:
                g = 2 * tl.sigmoid(2 * g) - 1
            u *= g
        # The norm reads the rounded sum, as later layers do.
        rounded = (x + u).to(summed.dtype.element_ty)
        tl.store(summed + row[:, None] * width + column[None, :], rounded, mask=mask)
        x = rounded.to(tl.float32)
    if NORM != 0:
        if NORM == 1:
            x -= (tl.sum(x, axis=1) / width)[:, None]
            x = tl.where(mask, x, 0.0)
        x *= tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)[:, None]
        if weight is not None:
            x *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if scale is not None:
            s = tl.load(scale + sample[:, None] * scale_stride + column[None, :], mask=mask, other=0.0)
            x *= 1 + s.to(tl.float32)
        if shift is not None:
            s = tl.load(shift + sample[:, None] * shift_stride + column[None, :], mask=mask, other=0.0)
            x += s.to(tl.float32)
        place = row[:, None] * width + column[None, :]
        tl.store(normed + place, x.to(normed.dtype.element_ty), mask=mask)


def _shape(width: int) -> tuple[int, int, int]:
    """Columns, rows and warps of a program: about 16 elements per thread, so that loads have 16 bytes."""
    block = power_of_two(width)
    rows = max(1, 1024 // block)
    return block, rows, max(1, min(16, rows * block // 512))


def forward(
    hidden: Tensor, update: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, update_weight: Tensor | None, ids: Tensor | None,
    summed: Tensor | None, normed: Tensor | None, norm: str, eps: float, update_norm: bool, update_eps: float,
    tanh_gate: bool,
) -> None:  # fmt: skip
    """Launch. hidden and update [n, L, D], conditioning [samples, D], outputs contiguous or None; rows contiguous."""
    n, length, width = hidden.shape
    rows = n * length
    if not hidden.numel():
        return
    block, together, warps = _shape(width)
    given = [x for x in (gate, scale, shift) if x is not None]
    run_kernel(
        _forward,
        (cdiv(rows, together),),
        hidden, update, gate, scale, shift, weight, bias, update_weight, ids, summed, normed, rows, length,
        given[0].shape[0] if given else 1, width, *hidden.stride()[:2],
        *((0, 0) if update is None else update.stride()[:2]),
        *(0 if x is None else x.stride(0) for x in (gate, scale, shift)), float(eps), float(update_eps),
        NORM=NORMS[norm], UPDATE_NORM=update_norm, TANH=tanh_gate, ROWS=together, BLOCK=block, num_warps=warps,
    )  # fmt: skip


@triton.jit
def _rows_of(bounds, sample, length):  # type: ignore[no-untyped-def]
    """The first row of a sample, and the one after its last."""
    if bounds is not None:
        # Clamped to existing rows: wrong bounds must not read other memory.
        first = tl.maximum(tl.load(bounds + sample).to(tl.int64), 0)
        last = tl.minimum(tl.load(bounds + sample + 1).to(tl.int64), length)
    else:
        first = sample * length
        last = first + length
    return first, last


@triton.jit
def _slope_of_norm(weight, scale, at, column, inside, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """d z / d xhat: the factor of the normalised row."""
    factor = tl.full((BLOCK,), 1.0, tl.float32)
    if weight is not None:
        factor *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        factor *= 1 + tl.load(scale + at + column, mask=inside, other=0.0).to(tl.float32)
    return factor


@triton.jit
def _slope_of_update(  # type: ignore[no-untyped-def]
    gate, update_weight, at, column, inside, TANH: tl.constexpr, BLOCK: tl.constexpr
):
    """d y / d uhat: the factor of the update."""
    through = tl.full((BLOCK,), 1.0, tl.float32)
    if gate is not None:
        through = tl.load(gate + at + column, mask=inside, other=0.0).to(tl.float32)
        if TANH:
            through = 2 * tl.sigmoid(2 * through) - 1
    if update_weight is not None:
        through *= tl.load(update_weight + column, mask=inside, other=0.0).to(tl.float32)
    return through


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad_summed, grad_normed, hidden, update, gate, scale, weight, update_weight, order, bounds, grad_hidden,
    grad_update, sums, length, samples, width, hidden_outer, hidden_inner, update_outer, update_inner,
    gate_stride, scale_stride, eps, update_eps,
    NORM: tl.constexpr, UPDATE_NORM: tl.constexpr, TANH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (part, sample): gradients of a part of the sample's rows, and their sums over these rows.

    `hidden` is the normalised tensor. sums [3, parts, samples, D]: of dz xhat, dz and dy uhat.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    first, last = _rows_of(bounds, sample, length)
    share = (last - first + parts - 1) // parts
    start = first + part * share
    stop = tl.minimum(start + share, last)

    factor = _slope_of_norm(weight, scale, sample * scale_stride, column, inside, BLOCK)
    through = _slope_of_update(gate, update_weight, sample * gate_stride, column, inside, TANH, BLOCK)

    sum_scale = tl.zeros((BLOCK,), tl.float32)
    sum_shift = tl.zeros((BLOCK,), tl.float32)
    sum_gate = tl.zeros((BLOCK,), tl.float32)
    for index in range(start, stop):
        row = index
        if order is not None:
            row = tl.load(order + index)
        place = row * width + column
        total = tl.zeros((BLOCK,), tl.float32)
        if grad_summed is not None:
            total += tl.load(grad_summed + place, mask=inside, other=0.0).to(tl.float32)
        if NORM != 0:
            dz = tl.load(grad_normed + place, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(hidden + _offset(row, length, hidden_outer, hidden_inner) + column, mask=inside, other=0.0).to(
                tl.float32
            )
            if NORM == 1:
                x = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
            inverse = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
            x *= inverse
            sum_scale += dz * x
            sum_shift += dz
            d = dz * factor
            slope = d - x * (tl.sum(d * x, axis=0) / width)
            if NORM == 1:
                slope -= tl.sum(d, axis=0) / width
            total += slope * inverse
        tl.store(grad_hidden + place, total.to(grad_hidden.dtype.element_ty), mask=inside)
        if update is not None:
            u = tl.load(update + _offset(row, length, update_outer, update_inner) + column, mask=inside, other=0.0).to(
                tl.float32
            )
            d = total * through
            if UPDATE_NORM:
                inverse = tl.rsqrt(tl.sum(u * u, axis=0) / width + update_eps)
                u *= inverse
                d = (d - u * (tl.sum(d * u, axis=0) / width)) * inverse
            sum_gate += total * u
            tl.store(grad_update + place, d.to(grad_update.dtype.element_ty), mask=inside)
    place = (part * samples + sample) * width + column
    step = parts.to(tl.int64) * samples * width
    if NORM != 0:
        tl.store(sums + place, sum_scale, mask=inside)
        tl.store(sums + step + place, sum_shift, mask=inside)
    if update is not None:
        tl.store(sums + 2 * step + place, sum_gate, mask=inside)


def backward(
    grad_summed: Tensor | None, grad_normed: Tensor | None, hidden: Tensor, update: Tensor | None,
    gate: Tensor | None, scale: Tensor | None, weight: Tensor | None, update_weight: Tensor | None,
    order: Tensor | None, bounds: Tensor | None, samples: int, norm: str, eps: float, update_norm: bool,
    update_eps: float, tanh_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden and update [n, L, D], and float32 sums [3, samples, D] over the rows of each sample."""
    n, length, width = hidden.shape
    grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    grad_update = hidden.new_empty(0) if update is None else torch.empty_like(grad_hidden, dtype=update.dtype)
    block = power_of_two(width)
    # Enough programs for all multiprocessors, and no more sums than rows.
    parts = max(1, min(cdiv(n * length, samples), cdiv(512, samples)))
    sums = torch.zeros((3, parts, samples, width), dtype=torch.float32, device=hidden.device)
    if hidden.numel():
        strides: Any = (
            *hidden.stride()[:2],
            *((0, 0) if update is None else update.stride()[:2]),
            *(0 if x is None else x.stride(0) for x in (gate, scale)),
        )
        run_kernel(
            _backward,
            (parts, samples),
            grad_summed, grad_normed, hidden, update, gate, scale, weight, update_weight, order, bounds,
            grad_hidden, grad_update, sums, length, samples, width, *strides, float(eps), float(update_eps),
            NORM=0 if grad_normed is None else NORMS[norm], UPDATE_NORM=update_norm, TANH=tanh_gate,
            BLOCK=block, num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
    return grad_hidden, grad_update, sums.sum(1)
