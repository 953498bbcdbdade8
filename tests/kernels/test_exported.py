"""Every operation is one node (or plain PyTorch) of an exported program, which draws the same from other inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, random
from long_tail import long_tail
from torch import Tensor, nn

from fastgen.kernels.adaln import adaln
from fastgen.kernels.dechunk import dechunk
from fastgen.kernels.dispatch import ran, reset_ran, use_kernels
from fastgen.kernels.group_norm_silu import group_norm_silu
from fastgen.kernels.kv_compact import kv_compact
from fastgen.kernels.pack import pack, pack_mask, pack_top, scatter
from fastgen.kernels.qk_norm_rope import qk_norm_rope
from fastgen.kernels.sample import sample, token_probabilities
from fastgen.kernels.tree_attention import tree_attention
from fastgen.kernels.tree_verify import tree_verify
from fastgen.kernels.varlen import varlen_attention

Given = tuple[Tensor, ...]
CASES: dict[str, tuple[Callable[..., Any], Callable[[int], Given]]] = {}


def case(function: Callable[..., Any]) -> Callable[[Callable[[int], Given]], None]:
    """Name of the decorated function -> what is exported, and its inputs by seed."""

    def add(inputs: Callable[[int], Given]) -> None:
        CASES[inputs.__name__] = (function, inputs)

    return add


def integers(high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@case(lambda hidden, update, gate, scale, shift: adaln(hidden, update=update, gate=gate, scale=scale, shift=shift))
def adaln_case(seed: int) -> Given:
    return random(2, 3, 8, seed=seed), random(2, 3, 8), *(random(2, 8, seed=i) for i in range(3))


@case(lambda qkv, cos, sin, at: qk_norm_rope(qkv[:, :, 0], qkv[:, :, 1], cos, sin, positions=at))
def qk_norm_rope_case(seed: int) -> Given:
    return random(2, 3, 3, 2, 8, seed=seed), random(9, 4), random(9, 4, seed=1), integers(9, 2, 3, seed=seed)


@case(lambda x, weight: group_norm_silu(x, 2, weight))
def group_norm_silu_case(seed: int) -> Given:
    return random(2, 8, 3, 5, seed=seed).to(memory_format=torch.channels_last), random(8)


def _there_and_back(tokens: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    top, masked = pack_top(scores, 5), pack_mask(scores > 0, scores.numel())
    return scatter(2 * pack(tokens, top), top), scatter(pack(tokens, masked), masked)


@case(_there_and_back)
def pack_case(seed: int) -> Given:
    return random(2, 9, 4, seed=seed), random(2, 9, seed=seed + 1)


def _dechunked(tokens: Tensor, scores: Tensor) -> Tensor:
    mask = scores > 0
    packing = pack_mask(mask, mask.numel())
    return dechunk(pack(tokens, packing), packing.positions, scores.sigmoid(), mask, (4, 5), full=False)


@case(_dechunked)
def dechunk_case(seed: int) -> Given:
    return random(2, 20, 3, seed=seed), random(2, 20, seed=seed + 1)


def _compacted(store: Tensor, lengths: Tensor, nodes: Tensor, count: Tensor) -> Tensor:
    kv_compact(store, lengths, nodes, count)
    return store


@case(_compacted)
def kv_compact_case(seed: int) -> Given:
    nodes = torch.tensor([[0, 2, 4], [0, 1, 5]], device=DEVICE)
    return random(2, 2, 2, 9, 1, 4, seed=seed), integers(3, 2, seed=seed), nodes, 1 + integers(3, 2, seed=seed)


@case(lambda a, b, noise: (sample(a, b, noise, 3.0, 0.8, 5), token_probabilities(a, b, 3.0, 0.8, None, 0.7)))
def sample_case(seed: int) -> Given:
    return random(2, 9, seed=seed), random(2, 9, seed=seed + 1), random(2, 9, seed=seed + 2)


def _attended(query: Tensor, key: Tensor, value: Tensor, store: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    slots = lengths[:, None] + torch.arange(3, device=lengths.device)
    seen = torch.ones(1, 9, dtype=torch.bool, device=lengths.device)
    tree = torch.ones(1, 3, 3, dtype=torch.bool, device=lengths.device).tril()
    return tree_attention(query, key, value, store, 1, slots, lengths, seen, tree, 9), store


@case(_attended)
def tree_attention_case(seed: int) -> Given:
    new = (random(1, 3, heads, 8, seed=seed + heads) for heads in (4, 2, 2))
    return *new, random(2, 2, 1, 9, 2, 8, seed=seed), integers(6, 1, seed=seed)


def _verified(scores: Tensor, tokens: Tensor, coins: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    def count(*numbers: Any) -> Tensor:
        return torch.tensor(numbers, device=scores.device)

    law, left = scores.softmax(-1), count(9, 9)
    return tuple(tree_verify(law, None, tokens, count([[1, 2], [-1, -1], [-1, -1]]), count(0), coins, noise, left, 1))


@case(_verified)
def tree_verify_case(seed: int) -> Given:
    coins = integers(1000, 2, 3, seed=seed).double() / 1000
    return random(2, 3, 9, seed=seed), integers(9, 2, 3, seed=seed), coins, random(2, 1, 9, seed=seed)


@case(lambda q, k, v, bounds: varlen_attention(q, k, v, bounds, 5))
def varlen_case(seed: int) -> Given:
    bounds = torch.tensor([0, 2 + seed, 7], dtype=torch.int32, device=DEVICE)
    return *(random(7, 2, 8, seed=seed + i) for i in range(3)), bounds


class Exported(nn.Module):
    """What `torch.export` takes: a module around a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


@pytest.mark.parametrize("mode", long_tail(["triton", "reference"], fast=("triton",)))
@pytest.mark.parametrize("name", CASES)
def test_the_program_does_the_same(name: str, mode: str) -> None:
    function, inputs = CASES[name]
    # Some operations write to their inputs.
    with torch.no_grad(), use_kernels(mode):
        program = torch.export.export(Exported(function), inputs(0)).module()
        for seed in (0, 1):
            wanted, actual = function(*inputs(seed)), program(*inputs(seed))
            for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (actual, wanted)), strict=True):
                # References may choose another form for compilers.
                torch.testing.assert_close(a, b, rtol=0, atol=0 if mode == "triton" else 1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name != "varlen_case"])
def test_kernels_are_what_was_exported(name: str) -> None:
    function, inputs = CASES[name]
    reset_ran()
    with torch.no_grad(), use_kernels("triton"):
        program = torch.export.export(Exported(function), inputs(0))
    assert set(ran().values()) == {"triton"}, ran()
    nodes = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert "fastgen" in nodes, nodes
