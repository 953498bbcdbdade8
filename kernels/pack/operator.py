"""Operators of packing, for compilers and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.operators import register_launcher

__all__ = ["launch_mask", "launch_scatter", "launch_top"]

_LAUNCHERS = "fastgen.kernels.pack.triton"
_PACKING = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


def _fake(grid: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    capacity = rest[-1]
    return (
        grid.new_empty(grid.shape, dtype=torch.bool),
        grid.new_empty(capacity, dtype=torch.int64),
        grid.new_empty(grid.shape[0] + 1, dtype=torch.int32),
        grid.new_empty(capacity, dtype=torch.int64),
        grid.new_empty(grid.shape, dtype=torch.int64),
    )


launch_mask = register_launcher(
    f"pack_mask(Tensor mask, SymInt capacity) -> {_PACKING}", f"{_LAUNCHERS}:launch_mask", _fake
)
launch_top = register_launcher(
    f"pack_top(Tensor scores, Tensor keep, SymInt capacity) -> {_PACKING}", f"{_LAUNCHERS}:launch_top", _fake
)
launch_scatter = register_launcher(
    "scatter(Tensor packed, Tensor mask, Tensor positions, Tensor rows) -> Tensor",
    f"{_LAUNCHERS}:launch_scatter",
    lambda packed, mask, *rest: packed.new_empty((*mask.shape, packed.shape[1])),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (positions,) = ctx.saved_tensors
    kept = grad.flatten(0, 1).index_select(0, positions.clamp_min(0))
    return torch.where((positions >= 0)[:, None], kept, 0.0), None, None, None


torch.library.register_autograd("fastgen::scatter", _backward, setup_context=_setup_context)
