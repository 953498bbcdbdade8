"""Attention of a token tree's nodes to the committed slots of a key-value cache and to their ancestors.

Every node sees the committed slots, so they need no mask over nodes: they are read as in flash attention, split over
programs if there are few rows and heads, and merged with the small block of the tree by log-sum-exp. The same launch
writes the nodes' keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.kernels.arguments import check_int, check_shape, check_tensors, shown
from fastgen.kernels.dispatch import Checked, check_range, checks_values, choose, needs_gradients
from fastgen.kernels.operators import register_launcher
from fastgen.kernels.tree_attention.reference import tree_attention_reference, tree_mask

__all__ = ["tree_attention", "tree_attention_pays", "tree_attention_reference", "tree_mask"]

_checked = Checked()
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_launch = register_launcher(
    "tree_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) store, SymInt layer, Tensor slots, "
    "Tensor lengths, Tensor visible, Tensor tree, SymInt limit) -> Tensor",
    "fastgen.kernels.tree_attention.triton:launch",
    lambda query, key, value, store, *rest: query.new_empty(query.shape, dtype=store.dtype),
    mutates=("store",),
)


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    store: Tensor,
    layer: int,
    slots: Tensor,
    lengths: Tensor,
    visible: Tensor,
    tree: Tensor,
    limit: int,
) -> Tensor:
    """Write the keys and values of n nodes of every row, then attend. Loss contract: exact up to rounding.

    Args:
        query: [R, n, query_heads, head_dim].
        key, value: [R, n, heads, head_dim]; heads divides query_heads.
        store: [layers, 2, R, capacity, heads, head_dim], index 0 of the second axis are keys; changed in place.
        layer: index of the layer.
        slots: int64 [R, n], slots of the nodes: distinct, at or after `lengths`.
        lengths: int64 [R], committed slots; node j of the tree is in slot `lengths + j`.
        visible: bool [R, capacity], which slots may be attended to once committed.
        tree: bool [1 or R, n, m], which of m nodes each of the n sees; each must see at least one slot.
        limit: slots from here on are ignored; at least `lengths` + m.

    Returns:
        [R, n, query_heads, head_dim] in the dtype of `store`.

    Raises:
        TypeError: an argument that must be a tensor is not one.
        ValueError: shapes, dtypes, devices or numbers that do not fit. Numbers in tensors are checked on a CPU, and
            with FASTGEN_KERNELS_DEBUG=1 on a GPU, where slots beyond `limit` are skipped otherwise.
    """
    tensors = (query, key, value, store, slots, lengths, visible, tree)
    _checked(lambda: _check(*tensors, layer, limit), tensors, layer, limit)
    _check_values(slots, lengths, visible, tree, limit)
    if not choose("tree_attention", _why_not(query, store), True, query, key, value, store, slots, tree):
        return tree_attention_reference(query, key, value, store, layer, slots, lengths, visible, tree, limit)
    return _launch(query, key, value, store, layer, slots, lengths, visible, tree, limit)


def tree_attention_pays(store: Tensor, tree: Tensor) -> bool:
    """Whether the kernel will run for queries like the rows of `tree` [1 or R, n, m]. If not, build the reference's
    mask (`tree_mask`) once for all layers."""
    return choose("tree_attention", _why_not(store, store), True, store, tree)


def _why_not(query: Tensor, store: Tensor) -> str | None:
    if store.dtype not in _TYPES or query.dtype not in _TYPES:
        return f"query and store of {query.dtype} and {store.dtype}"
    if store.stride(5) != 1:
        return "a store whose last axis is strided"
    if not 8 <= store.shape[5] <= 256:
        return f"heads of width {store.shape[5]}"
    if needs_gradients(query, store):
        return "gradients are needed"
    return None


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    store: Tensor,
    slots: Tensor,
    lengths: Tensor,
    visible: Tensor,
    tree: Tensor,
    layer: int,
    limit: int,
) -> None:
    """Check shapes, dtypes and devices."""
    needed = {"query": query, "key": key, "value": value, "store": store, "slots": slots, "lengths": lengths}
    check_tensors(needed | {"visible": visible, "tree": tree})
    if store.ndim != 6 or store.shape[1] != 2:
        raise ValueError(f"store: needs [layers, 2, R, capacity, heads, head_dim], got {tuple(store.shape)}")
    layers, _, rows, capacity, heads, width = store.shape
    for name, x in (("query", query), ("key", key), ("value", value), ("store", store)):
        if not x.is_floating_point():
            raise ValueError(f"{name}: needs floats, got {shown(x)}")
    check_int("layer", layer, 0, layers - 1)
    check_int("limit", limit, 0, capacity)
    if query.ndim != 4 or len(query) != rows or query.shape[3] != width or not heads or query.shape[2] % heads:
        raise ValueError(
            f"query: needs [{rows}, n, a multiple of {heads}, {width}] for this store, got {tuple(query.shape)}"
        )
    n = query.shape[1]
    if tree.ndim != 3 or tree.shape[0] not in (1, rows) or tree.shape[1] != n or tree.dtype != torch.bool:
        raise ValueError(f"tree: needs bool [1 or {rows}, {n}, m], got {shown(tree)}")
    for name, x in (("key", key), ("value", value)):
        if x.shape != (rows, n, heads, width):
            raise ValueError(f"{name}: needs floats {[rows, n, heads, width]}, got {shown(x)}")
    check_shape("slots", slots, (rows, n), torch.int64)
    check_shape("lengths", lengths, (rows,), torch.int64)
    check_shape("visible", visible, (rows, capacity), torch.bool)


def _check_values(slots: Tensor, lengths: Tensor, visible: Tensor, tree: Tensor, limit: int) -> None:
    """Check the values of index tensors, if `checks_values` says so."""
    if not checks_values(slots) or not slots.numel():
        return
    check_range("slots", slots, visible.shape[1])
    check_range("lengths", lengths, visible.shape[1] + 1)
    if bool((slots < lengths[:, None]).any()):
        raise ValueError("slots: need to be at or after lengths, and one belongs to a committed token")
    if bool((slots.sort(dim=1).values.diff(dim=1) == 0).any()):
        raise ValueError("slots: need to differ within a row")
    if int(lengths.max()) + tree.shape[2] > limit:
        raise ValueError(f"limit: {limit} is not allowed, needs {int(lengths.max()) + tree.shape[2]} (lengths + m)")
    blind = ~tree.any(dim=2)
    if bool(blind.any()):
        committed = torch.arange(visible.shape[1], device=lengths.device) < lengths[:, None]
        if bool((blind & ~(committed & visible).any(dim=1, keepdim=True)).any()):
            raise ValueError("tree: every node needs a slot to see, and one sees none")
