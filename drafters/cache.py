"""Keys and values of committed tokens and of one tree, in one preallocated tensor for all layers and both CFG rows.

Rows are [conditional …, unconditional …]. A row's slots hold its prompt (left-padded), then its committed image
tokens, then the nodes of the tree being verified. Committing a path moves its nodes' slots down, in all layers at
once: everything is read before anything is written, so source and target may overlap. The memory is allocated once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fastgen.kernels.cached_attention import cached_attention
from fastgen.kernels.kv_compact import kv_compact
from fastgen.kernels.tree_attention import tree_attention, tree_attention_pays, tree_mask

__all__ = ["KVCache", "AttentionMask", "TreeMask", "mask_for_tree"]


@dataclass
class KVCache:
    """See the module.

    Attributes:
        store: [layers, 2, R, capacity, heads, head_dim]; index 0 of the second axis are keys.
        visible: [R, capacity] bool: slots that may be attended to once committed (not the prompt's padding).
        lengths: [R] int64, committed slots, prompt included.
        bound: upper bound of the lengths, known without a host synchronisation; the capacity if shapes are static.
    """

    store: Tensor
    visible: Tensor
    lengths: Tensor
    bound: int

    @classmethod
    def allocate(
        cls,
        layers: int,
        prefix_mask: Tensor,
        room: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        static: bool = False,
    ) -> KVCache:
        """An empty cache.

        Args:
            layers, heads, head_dim, dtype: of the store.
            prefix_mask: [R, P] bool, real tokens of the prompts.
            room: slots beyond the prompt: image tokens and one tree.
            static: every pass attends over all slots, so that shapes stay the same; always so on a GPU.
        """
        rows, prompt = prefix_mask.shape
        device = prefix_mask.device
        store = torch.zeros(layers, 2, rows, prompt + room, heads, head_dim, dtype=dtype, device=device)
        visible = torch.ones(rows, prompt + room, dtype=torch.bool, device=device)
        visible[:, :prompt] = prefix_mask
        bound = prompt + room if static or device.type != "cpu" else 0
        return cls(store, visible, torch.zeros(rows, dtype=torch.int64, device=device), bound)

    @property
    def capacity(self) -> int:
        return int(self.store.shape[3])

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, slots: Tensor, mask: AttentionMask
    ) -> Tensor:
        """Write new tokens to `slots` [R, n] of a layer, then attend from them: see `cached_attention`."""
        given = (query, key, value, self.store, layer, slots)
        if isinstance(mask, Tensor):
            return cached_attention(*given, mask)
        return tree_attention(*given, mask.lengths, mask.visible, mask.tree, mask.limit)

    def narrow(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self.store, self.visible, self.lengths = self.store[:, :, rows], self.visible[rows], self.lengths[rows]

    def commit(self, nodes: Tensor, count: Tensor) -> None:
        """Keep the nodes of an accepted path and drop the rest of the tree.

        Args:
            nodes: [R, m] indices of the tree's nodes in path order; those past `count` are ignored.
            count: [R], nodes to keep.
        """
        kv_compact(self.store, self.lengths, nodes, count)
        self.advance(count, nodes.shape[1])

    def advance(self, count: Tensor | int, most: int) -> None:
        """Commit the next `count` slots of every row as they are, at most `most`."""
        self.lengths = self.lengths + count
        self.bound = min(self.bound + most, self.capacity)


@dataclass(frozen=True)
class TreeMask:
    """The attention mask of a tree's nodes, in the parts that `fastgen.kernels.tree_attention` reads.

    Attributes:
        lengths: [R] int64, committed slots; node 0 of the tree comes right after them.
        visible: [R, capacity] bool, slots that may be attended to once committed.
        tree: [R or 1, m, n] bool, which of n nodes each of the m query nodes sees.
        limit: slots attended over.
    """

    lengths: Tensor
    visible: Tensor
    tree: Tensor
    limit: int


AttentionMask: TypeAlias = Tensor | TreeMask
"""A mask [R, 1, m, limit] over the first slots, or the parts of a tree's mask."""


def mask_for_tree(cache: KVCache, tree: Tensor) -> AttentionMask:
    """Every node sees the committed slots of its row, its ancestors and itself. The mask covers the slots in use; in a
    static cache, all slots.

    Args:
        cache: its lengths are the slots of node 0.
        tree: [R or 1, m, n] bool, which of n nodes each of the m query nodes sees.
    """
    limit = min(cache.bound + tree.shape[-1], cache.capacity)
    if tree_attention_pays(cache.store, tree):
        return TreeMask(cache.lengths, cache.visible, tree, limit)
    return tree_mask(cache.lengths, cache.visible, tree, limit)  # once for all layers
