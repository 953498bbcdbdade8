"""Time and FLOPs of a deep model from a shallow one: what runs once, and one block of every kind.

A model is called once with its blocks passed over, which notes their arguments; that pass is what runs once. Then one
block of every kind is called with its arguments. A pass of the deep model is the former plus every kind as often as
the deep model has it. Z-Image's noise refiner and last layers see as many image tokens as a layer of the dense model,
up to the caption, and take its seconds per FLOP, so that the largest blocks run once a round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.accounting import account, count_flops

__all__ = ["KINDS", "Parts", "block_flops", "flops_of", "parts_of"]

#: Lists of blocks of a transformer.
KINDS = ("noise_refiner", "context_refiner", "layers", "last_layers", "transformer_blocks")
#: Those whose time is that of a dense layer, per FLOP.
LIKE_DENSE = ("noise_refiner", "last_layers")


@dataclass
class Parts:
    """A forward pass in parts.

    Attributes:
        counts: kind -> blocks of it in the deep model.
        calls: what is measured, by kind; "" is what runs once.
        flops: of each part once.
    """

    counts: Mapping[str, int]
    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)

    def total_flops(self) -> int:
        """Of a pass of the deep model."""
        return sum(flops * self.counts.get(kind, 1) for kind, flops in self.flops.items())

    def total_seconds(self, seconds: Mapping[str, float], dense_rate: float) -> float:
        """Of a pass of the deep model.

        Args:
            seconds: of each measured part.
            dense_rate: seconds per FLOP of a layer of the dense model.
        """
        return sum(
            seconds.get(kind, dense_rate * flops) * self.counts.get(kind, 1) for kind, flops in self.flops.items()
        )


def parts_of(model: Any, call: Callable[[], Any], counts: Mapping[str, int], compiled: bool = False) -> Parts:
    """The parts of a pass.

    Args:
        model: shallow, with at least one block of every kind in `counts`.
        call: a forward pass of it.
        counts: kind -> blocks of it in the deep model.
        compiled: compile the blocks (`torch.compile`).
    """
    with _passed_over(model) as seen:
        call()
        parts = Parts(counts)
        parts.flops[""] = flops_of(call)
    parts.calls[""] = partial(_without_blocks, model, call)
    for kind, (block, arguments, named) in seen.items():
        if kind in LIKE_DENSE:
            parts.flops[kind] = block_flops(block, arguments)
            continue
        run = torch.compile(block, dynamic=True) if compiled else block
        parts.calls[kind] = partial(run, *arguments, **named)
        stock = partial(block, *arguments, **named)
        parts.flops[kind] = flops_of(stock) if kind == "transformer_blocks" else block_flops(block, arguments)
    return parts


def flops_of(work: Callable[[], Any]) -> int:
    with account() as stats, count_flops():
        work()
    return stats.flops


def block_flops(block: nn.Module, arguments: tuple[Any, ...]) -> int:
    """Of a call of one of Z-Image's blocks, stock or ours: products of its linear layers, and attention."""
    hidden, *rest = arguments
    tokens, width = hidden.shape[:-1].numel(), hidden.shape[-1]
    conditioning = rest[2] if len(rest) > 2 else None
    wanted = rest[3] if len(rest) > 3 else None
    lengths = [hidden.shape[1]] * len(hidden) if hidden.ndim == 3 else rest[1].cu_seqlens.diff().tolist()
    rows = tokens if wanted is None else len(wanted[0])
    products = 0
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear):
            inside = name.startswith(("attention.to_q", "attention.to_k", "attention.to_v"))
            times = tokens if inside else rows
            if "adaLN" in name:
                times = 0 if conditioning is None else len(conditioning)
            products += times * layer.weight.numel()
    return 2 * products + 4 * width * sum(length * length for length in lengths)


@contextmanager
def _passed_over(model: Any) -> Iterator[dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]]:
    """Blocks return what they are given; collects the first block of every kind and its arguments."""
    seen: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}

    def passing(kind: str, block: nn.Module, *arguments: Any, **named: Any) -> Tensor:
        seen.setdefault(kind, (block, arguments, named))
        hidden, wanted = arguments[0], arguments[4] if kind == "last_layers" and len(arguments) > 4 else None
        return hidden if wanted is None else hidden.index_select(0, wanted[0])

    blocks = [(kind, block) for kind in KINDS for block in getattr(model, kind, ())]
    try:
        for kind, block in blocks:
            block.forward = partial(passing, kind, block)
        yield seen
    finally:
        for _, block in blocks:
            del block.forward


def _without_blocks(model: Any, call: Callable[[], Any]) -> None:
    with _passed_over(model):
        call()
