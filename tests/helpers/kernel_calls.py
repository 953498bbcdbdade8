"""A right call of every operation, for tests that change something about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.adaln import adaln
from fastgen.kernels.cached_attention import cached_attention
from fastgen.kernels.dechunk import dechunk, nearest_kept, smooth_kept
from fastgen.kernels.group_norm_silu import group_norm_silu
from fastgen.kernels.kv_compact import kv_compact
from fastgen.kernels.pack import pack, pack_mask, pack_top, scatter
from fastgen.kernels.qk_norm_rope import qk_norm_rope
from fastgen.kernels.sample import sample, token_probabilities
from fastgen.kernels.tree_attention import tree_attention
from fastgen.kernels.tree_verify import tree_verify
from fastgen.kernels.varlen import varlen_attention


def f(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05


def i(*numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def i32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


MASK = torch.tensor([[True, False, True, True], [False, True, False, False]])
PACKING = pack_mask(MASK, 4)
GRID = {"tokens": f(3, 4), "positions": i(0, 3, 5), "grid": (2, 2), "samples": 2, "sigma": 1.0}
TREE = {
    "query": f(2, 2, 2, 8),
    "key": f(2, 2, 1, 8),
    "value": f(2, 2, 1, 8),
    "store": f(3, 2, 2, 9, 1, 8),
    "layer": 1,
    "slots": i([3, 4], [1, 2]),
    "lengths": i(3, 1),
    "visible": torch.ones(2, 9, dtype=torch.bool),
    "tree": torch.tensor([[[True, False], [True, True]]]),
    "limit": 9,
}
VERIFY = {
    "target": f(2, 3, 5).softmax(-1),
    "draft": f(2, 3, 5).softmax(-1),
    "tokens": i([0, 1, 2], [3, 4, 0]),
    "children": i([[1, 2], [-1, -1], [-1, -1]]),
    "internal": i(0),
    "coins": f(2, 3),
    "gumbel": f(2, 1, 5),
    "remaining": i(4, 4),
    "max_depth": 1,
}

# Operation, and arguments that it takes.
GOOD: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "adaln": (
        adaln,
        {
            "hidden": f(5, 8), "update": f(5, 8), "gate": f(3, 8), "scale": f(3, 8), "shift": f(1, 8), "weight": f(8),
            "sequence_ids": i(0, 0, 2, 2, 2), "cu_seqlens": i32(0, 2, 2, 5),
        },
    ),
    "adaln padded": (adaln, {"hidden": f(2, 3, 8), "update": f(2, 3, 8), "gate": f(2, 8), "scale": f(1, 8)}),
    "qk_norm_rope": (
        qk_norm_rope,
        {
            "query": f(2, 3, 2, 8), "key": f(2, 3, 1, 8), "cos": f(7, 4), "sin": f(7, 4), "positions": i(0, 6, 2),
            "query_weight": f(8), "key_weight": f(8),
        },
    ),
    "group_norm_silu": (
        group_norm_silu,
        {"x": f(2, 4, 3, 3).contiguous(memory_format=torch.channels_last), "groups": 2, "weight": f(4), "bias": f(4)},
    ),
    "pack_mask": (pack_mask, {"mask": MASK, "capacity": 4}),
    "pack_top": (pack_top, {"scores": f(2, 4), "keep": i(1, 3), "capacity": 4}),
    "pack_top one": (pack_top, {"scores": f(2, 4), "keep": 2}),
    "pack": (pack, {"tokens": f(2, 4, 3), "packing": PACKING}),
    "scatter": (scatter, {"packed": f(4, 3), "packing": PACKING}),
    "nearest_kept": (nearest_kept, {"mask": MASK.view(2, 2, 2), "rows": torch.arange(8)}),
    "smooth_kept": (smooth_kept, {**GRID, "probabilities": f(3)}),
    "dechunk": (
        dechunk,
        {
            "tokens": f(4, 3), "positions": i(0, 2, 3, 5), "probabilities": f(2, 4), "mask": MASK, "grid": (2, 2),
            "sigma": 1.0,
        },
    ),
    "tree_verify": (tree_verify, VERIFY),
    "kv_compact": (
        kv_compact,
        {"store": f(2, 2, 2, 6, 1, 4), "lengths": i(1, 2), "nodes": i([0, 2], [1, 99]), "count": i(2, 1)},
    ),
    "sample": (sample, {"cond": f(2, 6), "uncond": f(2, 6), "gumbel": f(2, 6), "top_k": 3, "top_p": 0.9}),
    "token_probabilities": (token_probabilities, {"cond": f(2, 6), "uncond": f(2, 6)}),
    "tree_attention": (tree_attention, TREE),
    "cached_attention": (
        cached_attention,
        {
            **{name: TREE[name] for name in ("query", "key", "value", "store", "layer", "slots")},
            "mask": torch.ones(2, 1, 2, 9, dtype=torch.bool),
        },
    ),
    "varlen_attention": (
        varlen_attention,
        {"query": f(5, 2, 8), "key": f(5, 2, 8), "value": f(5, 2, 8), "cu_seqlens": i32(0, 2, 5), "max_seqlen": 3},
    ),
}  # fmt: skip
