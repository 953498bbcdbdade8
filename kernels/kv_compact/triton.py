"""Triton kernel of `fastgen.kernels.kv_compact`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.triton_tools import cdiv, power_of_two, run_kernel

_BYTES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _compact(  # type: ignore[no-untyped-def]
    store, lengths, nodes, count, rows, most, capacity, width,
    layer_stride, kind_stride, row_stride, slot_stride, node_stride,
    NODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of keys or values of one layer, `BLOCK` features of all slots of its path."""
    plane = tl.program_id(0)
    row = (plane % rows).to(tl.int64)
    base = store + (plane // (2 * rows)).to(tl.int64) * layer_stride + (plane // rows % 2) * kind_stride
    base += row * row_stride
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, NODES)
    start = tl.load(lengths + row)
    node = tl.load(nodes + row * node_stride + place, mask=place < most, other=0)
    source, target = start + node, start + place
    # A node that is already in place does not move; slots outside the cache are never accessed.
    moves = (place < tl.minimum(tl.load(count + row), most)) & (node != place)
    moves = moves & (source >= 0) & (source < capacity) & (target < capacity)
    fits = moves[:, None] & (feature < width)[None, :]
    values = tl.load(base + source[:, None] * slot_stride + feature[None, :], mask=fits, other=0)
    # All threads must have read before any thread writes.
    tl.debug_barrier()
    tl.store(base + target[:, None] * slot_stride + feature[None, :], values, mask=fits)


def launch(store: Tensor, lengths: Tensor, nodes: Tensor, count: Tensor) -> None:
    """See `fastgen.kernels.kv_compact.kv_compact`."""
    layers, _, rows, capacity, heads, head_dim = store.shape
    width, most = heads * head_dim, nodes.shape[1]
    if not store.numel() or not most:
        return
    held = power_of_two(most)
    block = max(16, min(power_of_two(width), 8192 // held, 1024))
    nodes = nodes if nodes.stride(1) == 1 else nodes.contiguous()
    run_kernel(
        _compact,
        (layers * 2 * rows, cdiv(width, block)),
        store.view(_BYTES[store.element_size()]), lengths.contiguous(), nodes, count.contiguous(),
        rows, most, capacity, width, *store.stride()[:4], nodes.stride(0),
        NODES=held, BLOCK=block, num_warps=4,
    )  # fmt: skip
