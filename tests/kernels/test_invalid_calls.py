"""What operations refuse, in both modes: an error that names the argument, never another one, a result, or a wait."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_calls import GOOD, MASK, f, i, i32
from torch import Tensor

from fastgen.kernels.dispatch import use_kernels
from fastgen.kernels.qk_norm_rope import qk_norm_rope

NAN, BIG = math.nan, 2**40

# Operation, the argument that the message names, and its wrong values (for several at once: a dict).
BAD: list[tuple[str, str, list[Any]]] = [
    ("adaln", "hidden", [f(8), f(5, 8).long()]),
    ("adaln", "update", [f(5, 7), f(4, 8), f(5, 8).int()]),
    ("adaln", "gate", [f(2, 8), f(8), f(3, 8).int()]),
    ("adaln", "scale", [f(3, 7), f(4, 8)]),
    ("adaln", "shift", [f(2, 8)]),
    ("adaln", "weight", [f(7), f(1, 8)]),
    ("adaln", "sequence_ids", [i(0, 0, 2, 2), i(0, 0, 3, 2, 2), i(0, -1, 2, 2, 2), f(5)]),
    (
        "adaln",
        "cu_seqlens",
        [i32(0, 5), i32(0, 2, 2, 4), i32(1, 2, 2, 5), i32(0, 4, 2, 5), i32(0, 1, 2, 5), i32(0, 2, 3, 5), f(4)],
    ),
    ("adaln", "norm", ["batch", None]),
    ("adaln", "eps", [NAN, -1.0, "1", None, True]),
    ("adaln", "update_eps", [math.inf]),
    ("adaln", "tanh_gate", [1, "yes"]),
    ("adaln", "update_norm", [None]),
    ("adaln", "update_weight", [f(8)]),
    ("adaln padded", "gate", [f(3, 8), {"update": None}]),
    ("adaln padded", "cu_seqlens", [i32(0, 3)]),
    ("adaln padded", "sequence_ids", [i(0, 1)]),
    ("qk_norm_rope", "query", [f(3, 8), f(2, 3, 2, 7), f(2, 3, 2, 8).int()]),
    ("qk_norm_rope", "key", [f(2, 3, 8), f(2, 4, 1, 8), f(2, 3, 1, 8).half()]),
    ("qk_norm_rope", "cos", [f(7, 3), f(3, 7, 4), f(7, 4).int(), None]),
    ("qk_norm_rope", "sin", [f(6, 4)]),
    ("qk_norm_rope", "positions", [i(0, 7, 2), i(0, -1, 2), i(0, 1), f(3), {"cos": None, "sin": None}]),
    ("qk_norm_rope", "axes", [(4, 2), (3, 5), (8.0,), (True, 7), 8, (2, 2, 2, 2)]),
    ("qk_norm_rope", "query_weight", [f(4)]),
    ("qk_norm_rope", "norm", ["batch"]),
    ("qk_norm_rope", "eps", [NAN, "1"]),
    ("qk_norm_rope", "interleaved", [1]),
    ("qk_norm_rope", "inplace", ["yes"]),
    ("group_norm_silu", "x", [f(2, 4), f(2, 4, 3, 3).int()]),
    ("group_norm_silu", "groups", [0, -2, 3, 2.0, True, "2", None]),
    ("group_norm_silu", "weight", [f(2), f(4).int()]),
    ("group_norm_silu", "eps", [NAN, -1e-5, None]),
    ("group_norm_silu", "silu", [1]),
    ("pack_mask", "mask", [MASK[0], MASK.float()]),
    ("pack_mask", "capacity", [3, -1, 9, 4.0, True, BIG, {"capacity": 5, "full": True}]),
    ("pack_mask", "full", [1]),
    ("pack_top", "scores", [f(4), f(2, 4).double(), f(2, 4).int()]),
    ("pack_top", "keep", [i(1), i32(1, 3), f(2)]),
    ("pack_top", "capacity", [3, -1, 9, 4.5]),
    ("pack_top one", "keep", [0, 5, -1, 2.0, True, "2", None]),
    ("pack_top one", "capacity", [3]),
    ("pack", "tokens", [f(2, 3, 3), f(2, 4), f(2, 4, 3).int()]),
    ("pack", "packing", [MASK, None]),
    ("scatter", "packed", [f(3, 3), f(4), f(4, 3).int()]),
    ("scatter", "packing", [MASK]),
    ("nearest_kept", "mask", [MASK, MASK.view(2, 2, 2).int()]),
    ("nearest_kept", "rows", [torch.arange(7), torch.arange(8).int()]),
    ("smooth_kept", "tokens", [f(4), f(2, 4), f(3, 4).int()]),
    (
        "smooth_kept",
        "positions",
        [i(0, 3, 8), i(-1, 3, 5), i(0, 3, -1), i(3, 0, 5), i(0, 3, 3), i(0, 3), i32(0, 3, 5), i(0, 3, BIG)],
    ),
    ("smooth_kept", "positions", [{"positions": i(0, -1, 5), "full": False}, {"samples": 1}]),
    ("smooth_kept", "probabilities", [f(2), i(1, 0, 1), f(3).half(), f(3).double()]),
    ("smooth_kept", "grid", [(2,), 4, (0, 4), (2.0, 2), (-2, -2), (True, 4)]),
    ("smooth_kept", "samples", [-1, 2.0, True]),
    ("smooth_kept", "sigma", [0, -1.0, NAN, math.inf, "1", None]),
    ("smooth_kept", "rows", [torch.arange(7), torch.arange(8).float()]),
    ("smooth_kept", "full", [1]),
    ("dechunk", "positions", [i(0, 2, 3, 8), i(2, 0, 3, 5), i(0, 2, 3, -1)]),
    ("dechunk", "mask", [MASK.float(), MASK[0]]),
    ("dechunk", "grid", [(2, 3), (4,), (2.0, 2.0)]),
    ("dechunk", "sigma", [0.0, NAN, "1"]),
    ("dechunk", "probabilities", [f(2, 3), f(2, 4).long()]),
    ("tree_verify", "target", [f(2, 3), f(2, 3, 5).double()]),
    ("tree_verify", "draft", [f(2, 3, 4), f(2, 3, 5).half()]),
    ("tree_verify", "tokens", [i([0, 1, 2], [3, 5, 0]), i([0, 1, 2], [3, -1, 0]), i([0, 1], [3, 4])]),
    ("tree_verify", "children", [i([[1, 3]] + [[-1, -1]] * 2), i([[1, -2]] + [[-1, -1]] * 2), i([[1, 2]])]),
    ("tree_verify", "children", [i([[1, 2], [0, -1], [-1, -1]]), i([[0, 2], [-1, -1], [-1, -1]])]),  # cycles
    ("tree_verify", "internal", [i(3), i(-1), i(0, 0), i32(0), i([0])]),
    ("tree_verify", "coins", [f(2, 2), f(2, 3) * NAN, f(2, 3) - 1, i([0, 0, 0], [0, 0, 0]), None]),
    ("tree_verify", "gumbel", [f(2, 5), f(2, 3, 5), f(2, 1, 5).double()]),
    ("tree_verify", "remaining", [i(4), i(4, -1), f(2)]),
    ("tree_verify", "max_depth", [-1, 3, BIG, 1.0, True, "1", None]),
    ("tree_verify", "factor", [f(2, 1), f(2, 1) * NAN, f(2, 2) + 1]),
    ("tree_verify", "classes", [i([[9] * 5], [[0] * 5]), i([[-1] * 5], [[0] * 5])]),
    ("kv_compact", "store", [f(2, 2, 6, 1, 4), f(2, 3, 2, 6, 1, 4)]),
    ("kv_compact", "lengths", [i(-1, 2), i(1, 7), i(1), i32(1, 2), i(5, 2)]),
    ("kv_compact", "nodes", [i([0, -1], [1, 0]), i([0, 6], [1, 0]), i([0, 5], [1, 0]), i(0, 2), f(2, 2)]),
    ("kv_compact", "count", [i(3, 1), i(-1, 1), i(1), f(2)]),
    ("sample", "cond", [f(6), f(2, 0), i([0, 1], [1, 0])]),
    ("sample", "uncond", [f(2, 5), f(2, 6).half()]),
    ("sample", "gumbel", [f(2, 5), f(2, 6).double()]),
    ("sample", "guidance_scale", [NAN, math.inf, "2", None]),
    ("sample", "temperature", [-1.0, NAN, math.inf, "1", None, True]),
    ("sample", "top_k", [0, -1, 2.5, True, "3"]),
    ("sample", "top_p", [0.0, 1.5, NAN, -1, "0.9", True]),
    ("token_probabilities", "cond", [i([0, 1], [1, 0]), f(2, 0)]),
    ("token_probabilities", "temperature", [-1.0, "1"]),
    ("token_probabilities", "top_k", [0, 2.5]),
    ("tree_attention", "query", [f(2, 2, 2, 4), f(2, 2, 8), f(1, 2, 2, 8), f(2, 2, 2, 8).int()]),
    ("tree_attention", "key", [f(2, 1, 1, 8), f(2, 2, 1, 8).long()]),
    ("tree_attention", "store", [f(3, 2, 2, 9, 8), f(3, 2, 2, 9, 1, 8).int()]),
    ("tree_attention", "layer", [3, -1, 1.0, True, BIG, None]),
    ("tree_attention", "slots", [i([3, 9], [1, 2]), i([3, -1], [1, 2]), i([2, 4], [1, 2]), i([3, 3], [1, 2])]),
    ("tree_attention", "lengths", [i(3, -1), i(3, 10), i(3), f(2)]),
    ("tree_attention", "limit", [10, -1, 4, 0, 9.0, True, BIG, "9"]),
    ("tree_attention", "visible", [torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 9)]),
    ("tree_attention", "tree", [torch.ones(1, 2, 2), torch.ones(3, 2, 2) > 0, torch.ones(2, 2) > 0]),
    ("tree_attention", "tree", [{"tree": torch.zeros(1, 2, 2) > 0, "visible": torch.zeros(2, 9) > 0}]),
    ("cached_attention", "layer", [3, -1, True]),
    ("cached_attention", "slots", [i([3, 9], [1, 2]), i([3, -1], [1, 2]), i32(3, 4)]),
    ("cached_attention", "mask", [torch.ones(2, 1, 2, 9), torch.ones(2, 1, 2, 10) > 0, torch.ones(2, 9) > 0]),
    ("varlen_attention", "query", [f(5, 8), f(5, 2, 8).int(), f(4, 2, 8)]),
    ("varlen_attention", "key", [f(4, 2, 8), f(5, 2, 8).half()]),
    (
        "varlen_attention",
        "cu_seqlens",
        [i32(0, 2, 6), i32(1, 2, 5), i32(0, 3, 2, 5), i32(0, -2, 5), i32(0), i(0, 2, 5), i32(0, 9)],
    ),
    ("varlen_attention", "max_seqlen", [2, 0, -3, 3.0, True, "3", None]),
]  # fmt: skip


def changes() -> list[Any]:
    """Every wrong call: what is wrong in particular, and for every tensor what is no tensor or on another device."""
    cases = []
    for name, argument, values in BAD:
        for number, value in enumerate(values):
            change = value if isinstance(value, dict) else {argument: value}
            cases.append(pytest.param(name, argument, change, id=f"{name}-{argument}-{number}"))
    for name, (_, arguments) in GOOD.items():
        tensors = [key for key, value in arguments.items() if isinstance(value, Tensor)]
        for argument in tensors:
            if name != "pack_top" or argument != "keep":  # may be a number
                cases.append(pytest.param(name, argument, {argument: [1.0]}, id=f"{name}-{argument}-list"))
            if len(tensors) > 1 or "packing" in arguments:
                wrong = {argument: arguments[argument].to("meta")}
                cases.append(pytest.param(name, "meta", wrong, id=f"{name}-{argument}-meta"))
    return cases


CASES = changes()


@pytest.mark.parametrize("name", GOOD)
def test_what_is_right_is_taken(name: str) -> None:
    operation, arguments = GOOD[name]
    for mode in ("reference", "triton"):
        with use_kernels(mode):
            operation(
                **{key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()}
            )


def test_there_are_many() -> None:
    assert len(CASES) >= 300


@pytest.mark.parametrize(("name", "argument", "change"), CASES)
def test_what_is_wrong_is_refused(name: str, argument: str, change: dict[str, Any]) -> None:
    operation, arguments = GOOD[name]
    for mode in ("reference", "triton"):
        with use_kernels(mode), pytest.raises((ValueError, TypeError)) as caught:
            operation(**{**arguments, **change})
        message = str(caught.value)
        assert argument in message and "\n" not in message, message
        assert "the Triton kernel cannot run" not in message, message


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.rand(1, 1, 2, 8).expand(2, 3, 2, 8), torch.rand(2, 3, 1, 8)),
        lambda: (torch.rand(2, 3, 2, 8), torch.rand(2, 3, 1, 8).expand(2, 3, 2, 8)),
        lambda: (x := torch.rand(2, 3, 2, 8), x),
        lambda: (x := torch.rand(2, 3, 24), x[..., :16].unflatten(-1, (2, 8)), x[..., 8:].unflatten(-1, (2, 8)))[1:],
        lambda: (x := torch.rand(40), x.as_strided((1, 4, 1, 8), (0, 4, 8, 1)), torch.rand(1, 4, 1, 8))[1:],
    ],
    ids=["expanded query", "expanded key", "the same", "overlapping slices", "overlapping windows"],
)
def test_memory_that_is_shared_is_not_written_to(make: Callable[[], tuple[Tensor, Tensor]]) -> None:
    query, key = make()
    before = query.clone(), key.clone()
    for mode in ("reference", "triton"):
        with use_kernels(mode), pytest.raises(ValueError, match="inplace: is not possible where elements of query or"):
            qk_norm_rope(query, key, inplace=True)
    assert torch.equal(query, before[0]) and torch.equal(key, before[1])
    qk_norm_rope(query, key)  # which is not in place


def test_slices_of_one_projection_are_written_to() -> None:
    fused = torch.rand(2, 5, 3, 2, 8)
    interleaved = torch.rand(2, 5, 2, 3, 8)
    for query, key in (fused.unbind(2)[:2], interleaved.unbind(3)[:2]):
        wanted = qk_norm_rope(query, key)
        for a, b in zip(qk_norm_rope(query, key, inplace=True), wanted, strict=True):
            assert torch.equal(a, b)
