"""Gradients of `fastgen.kernels.qk_norm_rope`: queries or keys, and weight and bias of their norm, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.qk_norm_rope.triton import (
    blocks_of,
    factors,
    load_pairs,
    options_of,
    statistics,
    store_pairs,
    table_of,
    weight_pairs,
)
from fastgen.kernels.triton_tools import cdiv, run_kernel

__all__ = ["backward"]


@triton.jit
def _turn_back(  # type: ignore[no-untyped-def]
    grad, start, out, weight, c, s, heads, head, grad_stride, head_stride, out_stride, half, eps,
    ROTATE: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one token's heads; returns its part of the weight and bias gradients, [HALF] each."""
    ga, gb = load_pairs(grad, grad_stride, heads, head, half, INTERLEAVED, HEADS, HALF)
    if ROTATE:
        ga, gb = ga * c + gb * s, gb * c - ga * s
    xa, xb = ga, gb
    da, db = ga, gb
    if NORM != 0:
        xa, xb = load_pairs(start, head_stride, heads, head, half, INTERLEAVED, HEADS, HALF)
        xa, xb, inverse = statistics(xa, xb, half, eps, NORM, HALF)
        xa, xb = xa * inverse, xb * inverse
        wa, wb = weight_pairs(weight, half, 1.0, INTERLEAVED, HALF)
        da, db = ga * wa, gb * wb
        slope = (tl.sum(da * xa, axis=1) + tl.sum(db * xb, axis=1))[:, None] / (2 * half)
        mean = 0.0
        if NORM == 1:
            mean = (tl.sum(da, axis=1) + tl.sum(db, axis=1))[:, None] / (2 * half)
        da, db = (da - xa * slope - mean) * inverse, (db - xb * slope - mean) * inverse
    store_pairs(out, da, db, out_stride, heads, head, half, INTERLEAVED, HEADS, HALF)
    return tl.sum(ga * xa, axis=0), tl.sum(gb * xb, axis=0), tl.sum(ga, axis=0), tl.sum(gb, axis=0)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad, tensor, out, cos, sin, positions, weight, sums, tokens, length, heads, half: tl.constexpr, limit, g0,
    g1, g2: tl.constexpr, x0, x1, x2: tl.constexpr, o0, o1, o2: tl.constexpr, t0, t1, t2, p0, p1, p2, first,
    second, eps,
    AXES: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Program (part, head block): a part of the tokens. sums [parts, blocks, 4, HALF]: weight, then bias, by pair."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    block, blocks = tl.program_id(1), tl.num_programs(1)
    head = block * HEADS + tl.arange(0, HEADS).to(tl.int64)
    share = (tokens + parts - 1) // parts
    start = part.to(tl.int64) * share
    stop = tl.minimum(start + share, tokens)
    wa = tl.zeros((HALF,), tl.float32)
    wb = tl.zeros((HALF,), tl.float32)
    ba = tl.zeros((HALF,), tl.float32)
    bb = tl.zeros((HALF,), tl.float32)
    for token in range(start, stop):
        sample, place = token // length, token % length
        c = 0.0  # defined here: a loop variable may not change its type
        s = 0.0
        if cos is not None:
            c, s = factors(
                cos, sin, positions, sample, place, limit, half, t0, t1, t2, p0, p1, p2, first, second, AXES, HALF
            )
        a, b, d, e = _turn_back(
            grad + sample * g0 + place * g1, tensor + sample * x0 + place * x1, out + sample * o0 + place * o1,
            weight, c, s, heads, head, g2, x2, o2, half, eps, cos is not None, NORM, INTERLEAVED, HEADS, HALF,
        )  # fmt: skip
        wa += a
        wb += b
        ba += d
        bb += e
    place = sums + (part * blocks + block) * 4 * HALF + tl.arange(0, HALF)
    tl.store(place, wa)
    tl.store(place + HALF, wb)
    tl.store(place + 2 * HALF, ba)
    tl.store(place + 3 * HALF, bb)


def backward(
    grad: Tensor, tensor: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None,
    axes: tuple[int, ...], weight: Tensor | None, norm: str, eps: float, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of queries or keys [n, L, heads, d], and of weight and bias [2, d] in float32."""
    n, length, count, width = tensor.shape
    out = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    half, heads, warps, blocks = blocks_of(tensor, tensor)
    parts = max(1, min(n * length, cdiv(1024, blocks)))
    sums = torch.zeros((parts, blocks, 4, half), dtype=torch.float32, device=tensor.device)
    if n * length:
        limit, table = table_of(cos, positions, axes)
        run_kernel(
            _backward,
            (parts, blocks),
            grad, tensor, out, cos, sin, positions, weight, sums, n * length, length, count, width // 2, limit,
            *grad.stride()[:3], *tensor.stride()[:3], *out.stride()[:3], *table, float(eps),
            **options_of(axes, norm, interleaved, heads, half, warps),
        )  # fmt: skip
    pairs = sums.sum((0, 1)).view(2, 2, half)[..., : width // 2]  # [weight or bias, feature of the pair, half]
    return out, (pairs.transpose(1, 2) if interleaved else pairs).reshape(2, width)
