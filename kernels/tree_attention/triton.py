"""Triton kernels of `fastgen.kernels.tree_attention`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.dispatch import interpreted
from fastgen.kernels.triton_tools import cdiv, power_of_two, precise, run_kernel

_PROGRAMS = 264
"""Target number of programs: two per multiprocessor of a large GPU."""


@triton.jit
def _pair(keys_of, values_of, at, held, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys and values of some slots, values in float32; with WIDE also the keys."""
    keys = tl.load(keys_of + at, mask=held, other=0.0)
    values = tl.load(values_of + at, mask=held, other=0.0).to(tl.float32)
    if WIDE:
        keys = keys.to(tl.float32)
    return keys, values


@triton.jit
def _block(queries, keys, values, seen, scale, best, total, mixed, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add one block of keys: online softmax, merged by log-sum-exp."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    scores = tl.where(seen, scores, float("-inf"))
    top = tl.maximum(best, tl.max(scores, axis=1))
    base = tl.where(top > float("-inf"), top, 0.0)  # nothing seen yet
    weight = tl.exp(scores - base[:, None])
    decay = tl.exp(best - base)
    total = total * decay + tl.sum(weight, axis=1)
    mixed = tl.dot(weight, values, mixed * decay[:, None], input_precision=PRECISION)
    return top, total, mixed


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query, key, value, store, slots, lengths, visible, tree, out, parts,
    n, m, heads, groups, width, limit, chunk, splits, scale,
    q_row, q_node, q_head, k_row, k_node, k_head, v_row, v_node, v_head,
    kind_stride, row_stride, slot_stride, head_stride, visible_stride, tree_stride,
    SPLIT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The queries of one row that share a key head, over one chunk of slots; the last chunk includes the tree."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    split = tl.program_id(1)
    feature = tl.arange(0, WIDTH)
    fits = feature < width
    line = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    node, group = line // groups, line % groups
    real = line < n * groups
    start = query + row * q_row + (node.to(tl.int64) * q_node + (head * groups + group) * q_head)[:, None]
    queries = tl.load(start + feature[None, :], mask=real[:, None] & fits[None, :], other=0.0)
    queries = queries.to(store.dtype.element_ty)
    if WIDE:
        queries = queries.to(tl.float32)
    keys_of = store + row * row_stride + head.to(tl.int64) * head_stride
    values_of = keys_of + kind_stride
    length = tl.load(lengths + row)
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
    last = tl.minimum(tl.minimum((split + 1) * chunk, limit), length)
    for first in range(split * chunk, last, KEYS):
        slot = first + tl.arange(0, KEYS)
        seen = tl.load(visible + row * visible_stride + slot, mask=slot < last, other=0) != 0
        at = slot.to(tl.int64)[:, None] * slot_stride + feature[None, :]
        held = (slot < last)[:, None] & fits[None, :]
        keys, values = _pair(keys_of, values_of, at, held, WIDE)
        best, total, mixed = _block(queries, keys, values, seen[None, :], scale, best, total, mixed, PRECISION)
    if split == splits - 1:
        for written in range(0, n, KEYS):
            new = written + tl.arange(0, KEYS)
            there = (new < n)[:, None] & fits[None, :]
            slot = tl.load(slots + row * n + new, mask=new < n, other=0)
            there = there & ((slot >= 0) & (slot < limit))[:, None]
            at = slot[:, None] * slot_stride + feature[None, :]
            fresh = key + row * k_row + new.to(tl.int64)[:, None] * k_node + head * k_head + feature[None, :]
            tl.store(keys_of + at, tl.load(fresh, mask=there).to(store.dtype.element_ty), mask=there)
            fresh = value + row * v_row + new.to(tl.int64)[:, None] * v_node + head * v_head + feature[None, :]
            tl.store(values_of + at, tl.load(fresh, mask=there).to(store.dtype.element_ty), mask=there)
        # Other threads of this program read what one has written.
        tl.debug_barrier()
        for of_tree in range(0, m, KEYS):
            other = of_tree + tl.arange(0, KEYS)
            slot = length + other
            there = (other < m) & (slot >= 0) & (slot < limit)
            seen = tl.load(
                tree + row * tree_stride + node[:, None] * m + other[None, :],
                mask=real[:, None] & there[None, :],
                other=0,
            )
            at = slot[:, None] * slot_stride + feature[None, :]
            held = there[:, None] & fits[None, :]
            keys, values = _pair(keys_of, values_of, at, held, WIDE)
            best, total, mixed = _block(queries, keys, values, seen != 0, scale, best, total, mixed, PRECISION)
    if SPLIT:
        spot = (tl.program_id(0).to(tl.int64) * splits + split) * n * groups + line
        part = parts + spot * (width + 2)
        tl.store(part, best, mask=real)
        tl.store(part + 1, total, mask=real)
        tl.store(part[:, None] + 2 + feature[None, :], mixed, mask=real[:, None] & fits[None, :])
    else:
        mixed = mixed / total[:, None]
        spot = ((row * n + node) * heads + head) * groups + group
        tl.store(
            out + spot[:, None] * width + feature[None, :],
            mixed.to(out.dtype.element_ty),
            mask=real[:, None] & fits[None, :],
        )


@triton.jit
def _merge(parts, out, n, heads, groups, width, splits, SPLITS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Merge the parts of one query, weighted by their share of the softmax's sum."""
    lines = n * groups
    plane, line = (tl.program_id(0) // lines).to(tl.int64), tl.program_id(0) % lines
    split, feature = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    real = split < splits
    part = parts + ((plane * splits + split) * lines + line) * (width + 2)
    best = tl.load(part, mask=real, other=float("-inf"))
    weight = tl.exp(best - tl.max(best, axis=0))
    total = tl.sum(weight * tl.load(part + 1, mask=real, other=0.0), axis=0)
    mixed = tl.load(part[:, None] + 2 + feature[None, :], mask=real[:, None] & (feature < width)[None, :], other=0.0)
    mixed = tl.sum(mixed * weight[:, None], axis=0) / total
    row, head = plane // heads, plane % heads
    place = ((row * n + line // groups) * heads + head) * groups + line % groups
    tl.store(out + place * width + feature, mixed.to(out.dtype.element_ty), mask=feature < width)


class _Plan(NamedTuple):
    """One launch: queries and keys per block, features, keys per split, and launch options."""

    queries: int
    keys: int
    columns: int
    chunk: int
    warps: int
    stages: int
    wide: bool


def _plan(planes: int, lines: int, width: int, limit: int, half: bool) -> _Plan:
    """The plan for `planes` (rows x heads) of `lines` queries."""
    queries = min(64, max(16, power_of_two(lines)))
    columns = max(16, power_of_two(width))
    blocks = cdiv(lines, queries)
    # With few programs, many small blocks hide the latency.
    keys = 64 if columns <= 128 and planes * blocks > _PROGRAMS // 2 else 32
    splits = max(1, min(cdiv(_PROGRAMS, planes * blocks), cdiv(limit, 2 * keys), 32))
    # Products of half-precision numbers are exact in float32; the interpreter does not support them.
    wide = not half or interpreted()
    return _Plan(queries, keys, columns, cdiv(cdiv(limit, splits), keys) * keys, 4, 3 if half else 2, wide)


def launch(
    query: Tensor, key: Tensor, value: Tensor, store: Tensor, layer: int, slots: Tensor, lengths: Tensor,
    visible: Tensor, tree: Tensor, limit: int,
) -> Tensor:  # fmt: skip
    """See `fastgen.kernels.tree_attention.tree_attention`."""
    rows, n, query_heads, width = query.shape
    heads, m = store.shape[4], tree.shape[2]
    groups = query_heads // heads
    out = torch.empty(query.shape, dtype=store.dtype, device=query.device)
    if not out.numel():
        return out
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    visible = visible.contiguous()
    tree = tree.contiguous()
    half = store.dtype != torch.float32
    plan = _plan(rows * heads, n * groups, width, limit, half)
    blocks = cdiv(n * groups, plan.queries)
    splits = max(1, cdiv(limit, plan.chunk)) if plan.chunk else 1
    parts = out if splits == 1 else out.new_empty(
        rows * heads * splits * n * groups * (width + 2), dtype=torch.float32
    )  # fmt: skip
    run_kernel(
        _attend,
        (rows * heads, splits, blocks),
        query, key, value, store[layer], slots.contiguous(), lengths.contiguous(), visible.view(torch.int8),
        tree.view(torch.int8), out, parts,
        n, m, heads, groups, width, limit, plan.chunk, splits, width**-0.5,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *store.stride()[1:5], visible.stride(0), 0 if len(tree) == 1 else tree.stride(0),
        # Half precision has no more mantissa bits than tf32.
        SPLIT=splits > 1, WIDE=plan.wide, PRECISION="tf32" if half else precise(),
        QUERIES=plan.queries, KEYS=plan.keys, WIDTH=plan.columns, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    if splits > 1:
        run_kernel(
            _merge,
            (rows * heads * n * groups,),
            parts, out, n, heads, groups, width, splits, SPLITS=power_of_two(splits), WIDTH=plan.columns,
            num_warps=1 if plan.columns <= 128 else 2,
        )  # fmt: skip
    return out
