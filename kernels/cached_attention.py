"""Attention over a key-value cache, after writing the new tokens' keys and values to it.

For compilers this is one opaque operator that changes the cache in place: traced op by op, each layer's write would
copy the whole cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.kernels.arguments import check_int, check_tensors, shown
from fastgen.kernels.dispatch import Checked, check_range, needs_gradients, plain

__all__ = ["cached_attention"]

_checked = Checked()


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, store: Tensor, layer: int, slots: Tensor, mask: Tensor
) -> Tensor:
    """Write the keys and values of n tokens of every row, then attend to the first slots.

    Args:
        query: [R, n, query_heads, head_dim].
        key, value: [R, n, heads, head_dim]; heads divides query_heads.
        store: [layers, 2, R, capacity, heads, head_dim], index 0 of the second axis are keys; changed in place.
        layer: index of the layer.
        slots: [R, n] int64, slots to write.
        mask: [R, 1, n, limit] bool over the first slots; every row of it sees at least one.

    Returns:
        [R, n, query_heads, head_dim] in the dtype of `store`.

    Raises:
        TypeError: an argument that must be a tensor is not one.
        ValueError: shapes, dtypes, devices or numbers that do not fit. `slots` are checked on a CPU, and with
            FASTGEN_KERNELS_DEBUG=1 on a GPU.
    """
    tensors = (query, key, value, store, slots, mask)
    _checked(lambda: _check(*tensors, layer), tensors, layer)
    check_range("slots", slots, store.shape[3])
    if torch.compiler.is_compiling() and not needs_gradients(query, key, value, store):
        output: Tensor = torch.ops.fastgen.cached_attention(query, key, value, store, layer, slots, mask)
        return output
    return _cached_attention(query, key, value, store, layer, slots, mask)


def _cached_attention(
    query: Tensor, key: Tensor, value: Tensor, store: Tensor, layer: int, slots: Tensor, mask: Tensor
) -> Tensor:
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    store[layer, 0, rows, slots] = key.to(store.dtype)  # under autocast the dtypes differ
    store[layer, 1, rows, slots] = value.to(store.dtype)
    on_cpu = mask.device.type == "cpu" and plain(mask) and not torch.compiler.is_compiling()
    if on_cpu:
        mask = _without_unseen(mask)
    keys, values = store[layer, :, :, : mask.shape[-1]].transpose(2, 3)
    grouped = keys.shape[1] != query.shape[2]
    query = query.to(store.dtype).transpose(1, 2)
    if on_cpu and query.shape[2] == 1 and store.dtype.itemsize == 2:  # PyTorch takes up to 8 times as long in bfloat16
        query, keys, values = query.float(), keys.float(), values.float()
    mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=grouped)
    return mixed.transpose(1, 2).to(store.dtype)


def _without_unseen(mask: Tensor) -> Tensor:
    """The mask without the slots behind the last one that is seen: with static shapes, many are not in use yet."""
    if not mask.numel():
        return mask
    seen = mask.flatten(0, 2).view(torch.uint8).amax(dim=0).nonzero()
    return mask[..., : int(seen[-1]) + 1] if len(seen) else mask


def _check(query: Tensor, key: Tensor, value: Tensor, store: Tensor, slots: Tensor, mask: Tensor, layer: int) -> None:
    """Check shapes, dtypes and devices."""
    needed = {"query": query, "key": key, "value": value, "store": store, "slots": slots, "mask": mask}
    check_tensors(needed)
    if store.ndim != 6 or store.shape[1] != 2:
        raise ValueError(f"store: needs [layers, 2, R, capacity, heads, head_dim], got {tuple(store.shape)}")
    check_int("layer", layer, 0, store.shape[0] - 1)
    rows, capacity, heads, width = store.shape[2:]
    if query.ndim != 4 or query.shape[0] != rows or query.shape[3] != width or not heads or query.shape[2] % heads:
        raise ValueError(f"query: needs [{rows}, n, a multiple of {heads}, {width}], got {shown(query)}")
    n = query.shape[1]
    for name, x in (("key", key), ("value", value)):
        if x.shape != (rows, n, heads, width):
            raise ValueError(f"{name}: needs {[rows, n, heads, width]}, got {shown(x)}")
    if slots.shape != (rows, n) or slots.dtype != torch.int64:
        raise ValueError(f"slots: needs int64 {[rows, n]}, got {shown(slots)}")
    if mask.ndim != 4 or mask.dtype != torch.bool or mask.shape[-1] > capacity or mask.shape[2] != n:
        raise ValueError(f"mask: needs bool [{rows}, 1, {n}, limit <= {capacity}], got {shown(mask)}")


def _operator(
    query: Tensor, key: Tensor, value: Tensor, store: Tensor, layer: int, slots: Tensor, mask: Tensor
) -> Tensor:
    return _cached_attention(query, key, value, store, layer, slots, mask).contiguous()


def _fake(query: Tensor, key: Tensor, value: Tensor, store: Tensor, layer: int, slots: Tensor, mask: Tensor) -> Tensor:
    return query.new_empty(query.shape, dtype=store.dtype)


# Not `torch.library.custom_op`, whose call costs 60 us more: a small model spends as much on the attention itself.
_SCHEMA = "(Tensor query, Tensor key, Tensor value, Tensor(a!) store, int layer, Tensor slots, Tensor mask) -> Tensor"
torch.library.define("fastgen::cached_attention", _SCHEMA)
torch.library.impl("fastgen::cached_attention", "CompositeExplicitAutograd", _operator)
torch.library.register_fake("fastgen::cached_attention", _fake)
