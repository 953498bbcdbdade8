"""Reference implementation of the gated residual, its norm and modulation, in plain PyTorch."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["adaln_reference", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / RMS(x) * weight over the last axis, statistics in float32, rounded as diffusers' `RMSNorm` does."""
    dtype = x.dtype
    wide = x if dtype == torch.float64 else x.float()
    x = x * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return x.to(dtype)
    return times(x.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else x, weight)


def times(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, in place if no gradient needs x: nothing else may use x."""
    if torch.is_grad_enabled() or torch.promote_types(x.dtype, factor.dtype) != x.dtype:
        return x * factor
    return x.mul_(factor)


def adaln_reference(
    hidden: Tensor,
    *,
    update: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    update_weight: Tensor | None = None,
    update_norm: bool = False,
    update_eps: float = 1e-6,
    tanh_gate: bool = False,
    sequence_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference implementation."""

    def rows(conditioning: Tensor) -> Tensor:
        if sequence_ids is not None:
            return conditioning.index_select(0, sequence_ids)
        return conditioning.unsqueeze(1) if hidden.ndim == 3 else conditioning

    if update is not None:
        if update_norm:
            update = rms_norm(update, update_weight, update_eps)
        if gate is None:
            hidden = hidden + update
        else:
            hidden = torch.addcmul(hidden, rows(gate.tanh() if tanh_gate else gate), update)
    if norm == "none":
        return hidden, hidden
    if norm == "rms":
        z = rms_norm(hidden, weight, eps)
        z = z if bias is None else z + bias
    else:
        z = _layer_norm(hidden, weight, bias, eps)
    if scale is None:
        return hidden, z if shift is None else z + rows(shift)
    factor = rows(1 + scale)
    return hidden, times(z, factor) if shift is None else torch.addcmul(rows(shift), z, factor)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's layer norm, which supports parameters of another dtype in some combinations only."""
    dtypes = {tensor.dtype for tensor in (x, weight, bias) if tensor is not None}
    if len(dtypes) == 1:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
    weight, bias = (None if vector is None else vector.to(wide) for vector in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(x.dtype)
