"""Muon: momentum whose update is orthogonalised (Jordan et al., 2024), in float32 or bfloat16.

`torch.optim.Muon` always orthogonalises in bfloat16, which CPUs without bfloat16 units emulate: we measured 27 GFLOP/s
against 90 in float32 on one AVX-512 core without them, and 440 against 97 on one with them. So the caller chooses the
precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

# Quintic Newton-Schulz coefficients of the Muon reference: they push singular values into about [0.7, 1.2].
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximate the nearest (semi-)orthogonal matrix to `matrix` [m, n] by Newton-Schulz iteration."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for 2-D weights; its step is scaled to the RMS of an AdamW step, so AdamW learning rates carry over.

    Args:
        params: 2-D parameters.
        lr: learning rate, > 0.
        momentum: momentum with Nesterov look-ahead, in [0, 1).
        weight_decay: decoupled weight decay, >= 0.
        bfloat16: orthogonalise in bfloat16, otherwise in the dtype of the weights.

    Raises:
        ValueError: a parameter is not 2-D, or a number is out of range.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        bfloat16: bool = False,
    ) -> None:
        if lr <= 0 or not 0 <= momentum < 1 or weight_decay < 0:
            raise ValueError(
                f"need lr > 0, 0 <= momentum < 1, weight_decay >= 0; got {lr}, {momentum}, {weight_decay}"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.bfloat16 = bfloat16
        for group in self.param_groups:
            for param in group["params"]:
                if param.ndim != 2:
                    raise ValueError(f"Muon takes 2-D parameters, got one of shape {tuple(param.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            momentum = group["momentum"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                buffer = state["momentum_buffer"]
                buffer.lerp_(param.grad, 1 - momentum)
                direction = param.grad.lerp(buffer, momentum)
                update = orthogonalize(direction.bfloat16() if self.bfloat16 else direction).to(param.dtype)
                param.mul_(1 - group["lr"] * group["weight_decay"])
                # 0.2 sqrt(max(m, n)): an orthogonal update then has the RMS of a usual AdamW update.
                param.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(param.shape)))
        return loss


def build_optimizers(
    module: torch.nn.Module, lr: float, precision: str = "fp32", adamw: bool = False
) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices; AdamW for embeddings, output heads, convolutions, norms and biases.

    A module can list substrings of further AdamW parameters in its attribute `adamw_names`. With `precision` "bf16",
    Muon orthogonalises in bfloat16, as its reference does. With `adamw`, AdamW trains everything: its update does not
    need whole matrices, so weights can be sharded.
    """
    names: tuple[str, ...] = getattr(module, "adamw_names", ())
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    hidden: list[torch.nn.Parameter] = []
    other: list[torch.nn.Parameter] = []
    for name, param in module.named_parameters():
        if not param.requires_grad:
            continue
        special = adamw or param.ndim != 2 or id(param) in embeddings or any(part in name for part in names)
        (other if special else hidden).append(param)
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(Muon(hidden, lr=lr, weight_decay=0.01, bfloat16=precision == "bf16"))
    if other:
        optimizers.append(torch.optim.AdamW(other, lr=lr, betas=(0.9, 0.98), weight_decay=0.0))
    return optimizers
