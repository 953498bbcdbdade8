"""Attention over a key-value cache to which the new tokens' keys and values are written first.

For compilers this is one opaque operator that changes the cache in place: traced op by op, every layer's write would
become a copy of the whole cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cached_attention"]


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, store: Tensor, layer: int, slots: Tensor, mask: Tensor
) -> Tensor:
    """Write keys and values of n tokens of every row, then attend to the first slots.

    Args:
        query: [R, n, query_heads, head_dim].
        key, value: [R, n, heads, head_dim]; heads divides query_heads.
        store: [layers, 2, R, capacity, heads, head_dim], index 0 of the second axis are keys; changed in place.
        layer: which of the layers.
        slots: [R, n] int64, where to.
        mask: [R, 1, n, limit] bool over the first slots; every row of it needs a slot to see.

    Returns:
        [R, n, query_heads, head_dim] in the dtype of `store`.
    """
    if torch.compiler.is_compiling():
        output: Tensor = torch.ops.fastgen.cached_attention(query, key, value, store, layer, slots, mask)
        return output
    return _cached_attention(query, key, value, store, layer, slots, mask)


def _cached_attention(
    query: Tensor, key: Tensor, value: Tensor, store: Tensor, layer: int, slots: Tensor, mask: Tensor
) -> Tensor:
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    store[layer, 0, rows, slots] = key.to(store.dtype)  # under autocast they have another
    store[layer, 1, rows, slots] = value.to(store.dtype)
    keys, values = store[layer, :, :, : mask.shape[-1]].transpose(2, 3)
    grouped = keys.shape[1] != query.shape[2]
    query = query.to(store.dtype).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=grouped)
    return mixed.transpose(1, 2)


@torch.library.custom_op("fastgen::cached_attention", mutates_args=("store",))
def _operator(
    query: Tensor, key: Tensor, value: Tensor, store: Tensor, layer: int, slots: Tensor, mask: Tensor
) -> Tensor:
    return _cached_attention(query, key, value, store, layer, slots, mask).contiguous()


@_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, store: Tensor, layer: int, slots: Tensor, mask: Tensor) -> Tensor:
    return query.new_empty(query.shape, dtype=store.dtype)
