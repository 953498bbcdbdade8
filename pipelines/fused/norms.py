"""Shared by the fused blocks of stock transformers: which norms the kernels support, and residual sums with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from fastgen.kernels.adaln import adaln
from fastgen.kernels.dispatch import active, needs_gradients
from fastgen.kernels.qk_norm_rope import qk_norm_rope

__all__ = ["Norm", "norm_of", "normed", "residual", "runs", "turn"]


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm as the kernels take it.

    Attributes:
        kind: "layer", "rms" or "none".
        eps: of the norm.
        weight, bias: [D] or None.
    """

    kind: str
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of `adaln`."""
        return {"norm": self.kind, "eps": self.eps, "weight": self.weight, "bias": self.bias}


def norm_of(module: nn.Module | None) -> Norm | None:
    """The norm that a module computes over its last axis; None for one that the kernels do not know."""
    if module is None or isinstance(module, nn.Identity):
        return Norm("none", 0.0)
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return Norm("layer", module.eps, module.weight, module.bias)
    if isinstance(module, RMSNorm) and len(module.dim) == 1:
        return Norm("rms", module.eps, module.weight, module.bias)
    if isinstance(module, nn.RMSNorm) and len(module.normalized_shape) == 1:
        eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
        return Norm("rms", eps, module.weight)
    return None


def runs(hidden: Tensor, *modules: nn.Module | None) -> bool:
    """Whether fused code serves this call: kernels run here, and the weights of the norms lie where `hidden` does.

    Sequential offload keeps them elsewhere until the norm's own forward is called.
    """
    if not active(hidden):
        return False
    return all(
        parameter.device == hidden.device
        for module in modules
        if module is not None
        for parameter in module.parameters(recurse=False)
    )


def normed(hidden: Tensor, module: nn.Module, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """norm(hidden) * (1 + scale) + shift, [n, L, D] with conditioning [n, D]."""
    norm = norm_of(module) or _unknown(module)
    return adaln(_rows(hidden), scale=scale, shift=shift, **norm.options())[1]


def residual(
    hidden: Tensor,
    update: Tensor,
    gate: Tensor | None,
    module: nn.Module | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """y = hidden + gate * update, and norm(y) * (1 + scale) + shift; without a module the second is y."""
    norm = norm_of(module) or _unknown(module)
    return adaln(_rows(hidden), update=update, gate=gate, scale=scale, shift=shift, **norm.options(), **options)


def _rows(hidden: Tensor) -> Tensor:
    """With contiguous rows: a patch embedding leaves the tokens of the first block turned around."""
    return hidden if hidden.stride(-1) == 1 else hidden.contiguous()


def turn(
    query: Tensor,
    key: Tensor,
    norms: tuple[nn.Module | None, nn.Module | None],
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalised and rotated queries and keys [n, L, heads, d] (neighbouring features), in place in eager mode
    without gradients. (Compilers reuse memory themselves.)"""
    first, second = (norm_of(module) or _unknown(module) for module in norms)
    inplace = not needs_gradients(query, key) and not torch.compiler.is_compiling()
    return qk_norm_rope(
        query,
        key,
        cos,
        sin,
        query_weight=first.weight,
        key_weight=second.weight,
        query_bias=first.bias,
        key_bias=second.bias,
        norm=first.kind,
        eps=first.eps,
        inplace=inplace,
    )


def same_norms(*pairs: tuple[nn.Module | None, nn.Module | None]) -> bool:
    """Whether queries and keys are normalised in one way that the kernels know."""
    for pair in pairs:
        first, second = (norm_of(module) for module in pair)
        if first is None or second is None or (first.kind, first.eps) != (second.kind, second.eps):
            return False
        if (first.weight is None) != (second.weight is None) or (first.bias is None) != (second.bias is None):
            return False
    return True


def _unknown(module: nn.Module | None) -> Norm:
    raise ValueError(f"norm: {type(module).__name__} is not one that kernels know")
