"""Move accepted paths down in a key-value cache, for all layers and both guidance rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.kernels.arguments import check_tensors
from fastgen.kernels.dispatch import check_range, checks_values, choose
from fastgen.kernels.kv_compact.reference import kv_compact_reference
from fastgen.kernels.operators import register_launcher

__all__ = ["kv_compact", "kv_compact_reference"]

_MOST_NODES = 128
"""Most nodes of a path that one program can process."""
_launch = register_launcher(
    "kv_compact(Tensor(a!) store, Tensor lengths, Tensor nodes, Tensor count) -> ()",
    "fastgen.kernels.kv_compact.triton:launch",
    lambda *arguments: None,
    mutates=("store",),
)


def kv_compact(store: Tensor, lengths: Tensor, nodes: Tensor, count: Tensor) -> None:
    """Move slot `lengths + nodes[:, j]` of every row to slot `lengths + j`, for j < count, in place.

    Everything is read before anything is written, so source and target may overlap. Slots from `lengths + count` on
    are undefined afterwards. Loss contract: exact.

    Args:
        store: [layers, 2, R, capacity, heads, head_dim], any strides.
        lengths: int64 [R], committed slots.
        nodes: int64 [R, m], nodes of the path; those past `count` are ignored.
        count: int64 [R], number of nodes to keep, at most m.

    Raises:
        TypeError: an argument that must be a tensor is not one.
        ValueError: another dtype, shape or device; on a CPU (on a GPU with FASTGEN_KERNELS_DEBUG=1) also lengths,
            counts and nodes outside the cache. Otherwise such slots are skipped.
    """
    check_tensors({"store": store, "lengths": lengths, "nodes": nodes, "count": count})
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
    _check_values(store, lengths, nodes, count)
    if not choose("kv_compact", why_not_triton(store, nodes), True, store, lengths, nodes, count):
        kv_compact_reference(store, lengths, nodes, count)
    else:
        _launch(store, lengths, nodes, count)


def _check_values(store: Tensor, lengths: Tensor, nodes: Tensor, count: Tensor) -> None:
    """Check that the path is inside the cache, if `checks_values` says so."""
    if not checks_values(nodes) or not nodes.numel():
        return
    capacity, most = store.shape[3], nodes.shape[1]
    # For the few numbers of a round, Python is faster than one torch reduction.
    rows = zip(lengths.tolist(), count.tolist(), nodes.tolist(), strict=True)
    if all(
        start >= 0 <= kept <= most
        and start + kept <= capacity
        and (kept == 0 or (min(path[:kept]) >= 0 and start + max(path[:kept]) < capacity))
        for start, kept, path in rows
    ):
        return
    check_range("lengths", lengths, capacity + 1)
    check_range("count", count, most + 1)
    kept = torch.arange(most, device=nodes.device) < count[:, None]
    check_range("nodes", torch.where(kept, nodes, 0), capacity)
    check_range("lengths + nodes", torch.where(kept, lengths[:, None] + nodes, 0), capacity)
    check_range("lengths + count", lengths + count, capacity + 1)


def why_not_triton(store: Tensor, nodes: Tensor) -> str | None:
    """Why the kernel does not support these arguments, or None."""
    if store.element_size() not in (1, 2, 4, 8) or store.is_complex():
        return f"a store of {store.dtype}"
    if store.stride(5) != 1 or store.stride(4) != store.shape[5]:
        return "heads of the store that are not contiguous"
    if nodes.shape[1] > _MOST_NODES:
        return f"paths of {nodes.shape[1]} nodes, more than {_MOST_NODES}"
    return None
