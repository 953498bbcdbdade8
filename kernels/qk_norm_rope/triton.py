"""Triton kernels of `fastgen.kernels.qk_norm_rope`: queries and keys of a token, all heads, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.triton_tools import cdiv, power_of_two, run_kernel

__all__ = ["blocks_of", "factors", "forward", "load_pairs", "options_of", "statistics", "store_pairs", "table_of"]
__all__ += ["weight_pairs"]

NORMS = {"none": 0, "layer": 1, "rms": 2}
_BOTH = 1024  # most features of a program that processes both queries and keys of a token


@triton.jit
def factors(  # type: ignore[no-untyped-def]
    cos, sin, positions, sample, place, limit, half, table_outer, table_inner, table_step, place_outer,
    place_inner, place_step, first, second,
    AXES: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Cosines and sines [HALF] of a token. Each axis has the columns up to its bound; positions are clamped."""
    column = tl.arange(0, HALF)
    row = tl.full((HALF,), 0, tl.int64) + place
    if positions is not None:
        start = positions + sample * place_outer + place * place_inner
        row = tl.full((HALF,), 0, tl.int64) + tl.load(start)
        if AXES > 1:
            row = tl.where(column < first, row, tl.load(start + place_step))
        if AXES > 2:
            row = tl.where(column < second, row, tl.load(start + 2 * place_step))
        row = tl.minimum(tl.maximum(row, 0), limit - 1)
    offset = sample * table_outer + row * table_inner + column * table_step
    c = tl.load(cos + offset, mask=column < half, other=0.0).to(tl.float32)
    s = tl.load(sin + offset, mask=column < half, other=0.0).to(tl.float32)
    return c[None, :], s[None, :]


@triton.jit
def load_pairs(  # type: ignore[no-untyped-def]
    start, head_stride, heads, head, half, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):
    """The two features of each pair, [HEADS, HALF] twice, in float32."""
    there = (head < heads)[:, None]
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, :]
        x = tl.load(start + head[:, None] * head_stride + column, mask=there & (column < 2 * half), other=0.0)
        a, b = tl.split(tl.reshape(x.to(tl.float32), (HEADS, HALF, 2)))
    else:
        column = tl.arange(0, HALF)[None, :]
        place = start + head[:, None] * head_stride + column
        a = tl.load(place, mask=there & (column < half), other=0.0).to(tl.float32)
        b = tl.load(place + half, mask=there & (column < half), other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pairs(  # type: ignore[no-untyped-def]
    start, a, b, head_stride, heads, head, half, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):
    there = (head < heads)[:, None]
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, :]
        x = tl.reshape(tl.join(a, b), (HEADS, 2 * HALF)).to(start.dtype.element_ty)
        tl.store(start + head[:, None] * head_stride + column, x, mask=there & (column < 2 * half))
    else:
        column = tl.arange(0, HALF)[None, :]
        place = start + head[:, None] * head_stride + column
        tl.store(place, a.to(start.dtype.element_ty), mask=there & (column < half))
        tl.store(place + half, b.to(start.dtype.element_ty), mask=there & (column < half))


@triton.jit
def weight_pairs(vector, half, fill, INTERLEAVED: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """A vector [d] of the norm as the two features of each pair."""
    column = tl.arange(0, HALF)
    if vector is not None:
        if INTERLEAVED:
            a = tl.load(vector + 2 * column, mask=column < half, other=0.0).to(tl.float32)
            b = tl.load(vector + 2 * column + 1, mask=column < half, other=0.0).to(tl.float32)
        else:
            a = tl.load(vector + column, mask=column < half, other=0.0).to(tl.float32)
            b = tl.load(vector + half + column, mask=column < half, other=0.0).to(tl.float32)
    else:
        a = tl.full((HALF,), fill, tl.float32)
        b = tl.full((HALF,), fill, tl.float32)
    return a[None, :], b[None, :]


@triton.jit
def statistics(a, b, half, eps, NORM: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Centred features and 1 / RMS [HEADS, 1]."""
    if NORM == 1:
        mean = (tl.sum(a, axis=1) + tl.sum(b, axis=1)) / (2 * half)
        inside = (tl.arange(0, HALF) < half)[None, :]
        a = tl.where(inside, a - mean[:, None], 0.0)
        b = tl.where(inside, b - mean[:, None], 0.0)
    square = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * half)
    return a, b, tl.rsqrt(square + eps)[:, None]


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    start, out, weight, bias, c, s, heads, head, head_stride, out_stride, half, eps,
    ROTATE: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    a, b = load_pairs(start, head_stride, heads, head, half, INTERLEAVED, HEADS, HALF)
    if NORM != 0:
        a, b, inverse = statistics(a, b, half, eps, NORM, HALF)
        wa, wb = weight_pairs(weight, half, 1.0, INTERLEAVED, HALF)
        ba, bb = weight_pairs(bias, half, 0.0, INTERLEAVED, HALF)
        a = a * inverse * wa + ba
        b = b * inverse * wb + bb
    if ROTATE:
        a, b = a * c - b * s, b * c + a * s
    store_pairs(out, a, b, out_stride, heads, head, half, INTERLEAVED, HEADS, HALF)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    query, key, out_query, out_key, cos, sin, positions, query_weight, key_weight, query_bias, key_bias, length,
    query_heads, key_heads, half: tl.constexpr, limit, q0, q1, q2: tl.constexpr, k0, k1, k2: tl.constexpr, oq0,
    oq1, oq2: tl.constexpr, ok0, ok1, ok2: tl.constexpr, t0, t1, t2, p0, p1, p2, first, second, query_blocks,
    eps,
    AXES: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    BOTH: tl.constexpr,
):  # fmt: skip
    """Program (token, head block): blocks of query heads, then of key heads; BOTH: one program per token."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    sample, place = token // length, token % length
    eps = tl.full([], eps, tl.float32)  # graph compilers pass 64-bit numbers
    c = 0.0
    s = 0.0
    if cos is not None:
        c, s = factors(
            cos, sin, positions, sample, place, limit, half, t0, t1, t2, p0, p1, p2, first, second, AXES, HALF
        )
    if BOTH or block < query_blocks:
        head = block * HEADS + tl.arange(0, HEADS).to(tl.int64)
        start, out = query + sample * q0 + place * q1, out_query + sample * oq0 + place * oq1
        _turn(
            start, out, query_weight, query_bias, c, s, query_heads, head, q2, oq2, half, eps,
            cos is not None, NORM, INTERLEAVED, HEADS, HALF,
        )  # fmt: skip
    if BOTH or block >= query_blocks:
        head = (block - (0 if BOTH else query_blocks)) * HEADS + tl.arange(0, HEADS).to(tl.int64)
        start, out = key + sample * k0 + place * k1, out_key + sample * ok0 + place * ok1
        _turn(
            start, out, key_weight, key_bias, c, s, key_heads, head, k2, ok2, half, eps,
            cos is not None, NORM, INTERLEAVED, HEADS, HALF,
        )  # fmt: skip


def blocks_of(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    """Half the head size, heads per program, warps, and programs per token for its queries."""
    half = power_of_two(query.shape[-1] // 2)
    heads = max(1, min(power_of_two(max(query.shape[2], key.shape[2])), 2048 // half))
    return half, heads, max(1, min(8, heads * half // 512)), cdiv(query.shape[2], heads)


def table_of(cos: Tensor | None, positions: Tensor | None, axes: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Rows of the table [n or 1, P, half]; its strides, those of positions [n or 1, L, A], and bounds of the axes."""
    strides = (
        (0, 0, 0) if cos is None else tuple(0 if cos.shape[0] == 1 and i == 0 else cos.stride(i) for i in range(3))
    )
    places = (0, 0, 0)
    if positions is not None:
        places = (0 if positions.shape[0] == 1 else positions.stride(0), positions.stride(1), positions.stride(2))
    bounds = [sum(axes[: i + 1]) // 2 for i in range(2)]
    return 0 if cos is None else cos.shape[1], (*strides, *places, *bounds)


def options_of(
    axes: tuple[int, ...], norm: str, interleaved: bool, heads: int, half: int, warps: int
) -> dict[str, int | bool]:
    """Compile-time options of both kernels."""
    return {
        "AXES": len(axes),
        "NORM": NORMS[norm],
        "INTERLEAVED": interleaved,
        "HEADS": heads,
        "HALF": half,
        "num_warps": warps,
    }


def forward(
    query: Tensor, key: Tensor, out_query: Tensor, out_key: Tensor, cos: Tensor | None, sin: Tensor | None,
    positions: Tensor | None, axes: tuple[int, ...], query_weight: Tensor | None, key_weight: Tensor | None,
    query_bias: Tensor | None, key_bias: Tensor | None, norm: str, eps: float, interleaved: bool,
) -> None:  # fmt: skip
    """Launch. query, key and outputs [n, L, heads, d]; cos and sin [n or 1, P, d / 2]; positions [n or 1, L, axes]."""
    n, length, query_heads, width = query.shape
    if not n * length:
        return
    half, heads, warps, query_blocks = blocks_of(query, key)
    limit, table = table_of(cos, positions, axes)
    key_blocks = cdiv(key.shape[2], heads)
    both = query_blocks == key_blocks == 1 and heads * half <= _BOTH
    run_kernel(
        _forward,
        (n * length, 1 if both else query_blocks + key_blocks),
        query, key, out_query, out_key, cos, sin, positions, query_weight, key_weight, query_bias, key_bias,
        length, query_heads, key.shape[2], width // 2, limit, *query.stride()[:3], *key.stride()[:3],
        *out_query.stride()[:3], *out_key.stride()[:3], *table, query_blocks, float(eps),
        BOTH=both, **options_of(axes, norm, interleaved, heads, half, warps),
    )  # fmt: skip
