"""Accepted paths moved down in a key-value cache, all layers and both rows of guidance at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.kernels.dispatch import choose, direct

__all__ = ["kv_compact", "kv_compact_reference"]

_MOST_NODES = 128
"""Nodes of a path that one program holds."""


def kv_compact(store: Tensor, lengths: Tensor, nodes: Tensor, count: Tensor) -> None:
    """Moves slot `lengths + nodes[:, j]` of every row to slot `lengths + j`, for j < count; in place.

    Everything is read before anything is written, so that source and target may overlap. Slots from
    `lengths + count` on are left undefined. Loss contract: exact.

    Args:
        store: [layers, 2, R, capacity, heads, head_dim], any strides.
        lengths: int64 [R], committed slots.
        nodes: int64 [R, m], nodes of the path; those past `count` do not matter.
        count: int64 [R], how many are kept, at most m.

    Raises:
        ValueError: another dtype or shape.
    """
    if store.ndim != 6 or store.shape[1] != 2 or nodes.ndim != 2 or len(nodes) != store.shape[2]:
        raise ValueError(
            f"store, nodes: need [layers, 2, R, capacity, heads, head_dim] and [R, m], got {tuple(store.shape)} and "
            f"{tuple(nodes.shape)}"
        )
    rows = nodes.shape[:1]
    if lengths.shape != rows or count.shape != rows:
        raise ValueError(f"lengths, count: need {list(rows)}, got {list(lengths.shape)} and {list(count.shape)}")
    if not lengths.dtype == nodes.dtype == count.dtype == torch.int64:
        raise ValueError(
            f"lengths, nodes, count: need torch.int64, got {lengths.dtype}, {nodes.dtype} and {count.dtype}"
        )
    if not choose("kv_compact", why_not_triton(store, nodes), True, store, lengths, nodes, count):
        kv_compact_reference(store, lengths, nodes, count)
    elif direct(store):
        from fastgen.kernels.kv_compact_triton import launch

        launch(store, lengths, nodes, count)
    else:
        torch.ops.fastgen.kv_compact(store, lengths, nodes, count)


def kv_compact_reference(store: Tensor, lengths: Tensor, nodes: Tensor, count: Tensor) -> None:
    """The specification of `kv_compact`."""
    rows = torch.arange(len(nodes), device=nodes.device)[:, None]
    source = lengths[:, None] + nodes
    target = lengths[:, None] + torch.arange(nodes.shape[1], device=nodes.device)
    taken = store[:, :, rows, source]
    store[:, :, rows, target] = taken


def why_not_triton(store: Tensor, nodes: Tensor) -> str | None:
    """None if the kernel takes these arguments, else why not."""
    if store.element_size() not in (1, 2, 4, 8) or store.is_complex():
        return f"a store of {store.dtype}"
    if store.stride(5) != 1 or store.stride(4) != store.shape[5]:
        return "heads of the store that do not lie side by side"
    if nodes.shape[1] > _MOST_NODES:
        return f"paths of {nodes.shape[1]} nodes, more than {_MOST_NODES}"
    return None


@torch.library.custom_op("fastgen::kv_compact", mutates_args=("store",))
def _operator(store: Tensor, lengths: Tensor, nodes: Tensor, count: Tensor) -> None:
    from fastgen.kernels.kv_compact_triton import launch

    launch(store, lengths, nodes, count)


@_operator.register_fake
def _(store: Tensor, lengths: Tensor, nodes: Tensor, count: Tensor) -> None:
    return None
