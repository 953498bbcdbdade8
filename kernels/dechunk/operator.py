"""Operators of de-chunking, for compilers and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.dechunk.reference import TINY
from fastgen.kernels.operators import register_launcher

__all__ = ["launch_nearest", "launch_smooth"]

_LAUNCHERS = "fastgen.kernels.dechunk.triton"

launch_nearest = register_launcher(
    "nearest_kept(Tensor mask, Tensor? rows) -> Tensor",
    f"{_LAUNCHERS}:launch_nearest",
    lambda mask, rows: torch.empty(mask.shape, dtype=torch.int64, device=mask.device),
)
launch_smooth = register_launcher(
    "smooth_kept(Tensor tokens, Tensor positions, Tensor probabilities, Tensor rows, int height, int width, "
    "float sigma) -> Tensor",
    f"{_LAUNCHERS}:launch_smooth",
    lambda tokens, *rest: torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device),
)


@torch.library.custom_op("fastgen::smooth_kept_backward", mutates_args=())
def _smooth_backward(
    grad: Tensor,
    tokens: Tensor,
    positions: Tensor,
    probabilities: Tensor,
    rows: Tensor,
    height: int,
    width: int,
    sigma: float,
) -> tuple[Tensor, Tensor]:
    from fastgen.kernels.dechunk.triton import launch_blur

    def blur(values: Tensor) -> Tensor:
        return launch_blur(values.contiguous(), positions, rows, height, width, sigma)

    # With w_j = max(p_j, tiny), S = G w, m = G (w h) / S and out = p h + (1 - p) m; G is symmetric.
    g, h = grad.float(), tokens.float()
    p = probabilities[:, None]
    weight = p.clamp(min=TINY)
    there = positions >= 0  # the padding after the last token is arbitrary
    mass = torch.where(there[:, None], blur(weight), 1.0)
    mixed = blur(weight * h) / mass
    passed = (1 - p) / mass * g
    back = blur(torch.cat([passed, (passed * mixed).sum(dim=1, keepdim=True)], dim=1))
    around, lost = back[:, :-1], back[:, -1]
    of_weight = ((h * around).sum(dim=1) - lost) * (probabilities >= TINY)
    of_p = (g * (h - mixed)).sum(dim=1) + of_weight
    of_tokens = torch.where(there[:, None], p * g + weight * around, 0.0).to(tokens.dtype)
    return of_tokens, torch.where(there, of_p, 0.0)


@_smooth_backward.register_fake
def _(grad: Tensor, tokens: Tensor, positions: Tensor, probabilities: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tokens), torch.empty_like(probabilities)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, positions, probabilities, rows, *ctx.numbers = inputs
    ctx.save_for_backward(tokens, positions, probabilities, rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_tokens, of_p = torch.ops.fastgen.smooth_kept_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return of_tokens, None, of_p, None, None, None, None


torch.library.register_autograd("fastgen::smooth_kept", _backward, setup_context=_setup_context)
