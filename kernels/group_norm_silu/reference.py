"""Reference implementation of group norm and SiLU, in plain PyTorch."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["group_norm_silu_reference"]


def group_norm_silu_reference(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """Reference implementation."""
    dtypes = {tensor.dtype for tensor in (x, weight, bias) if tensor is not None}
    if len(dtypes) > 1:  # torch supports some combinations only
        wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
        weight, bias = (None if vector is None else vector.to(wide) for vector in (weight, bias))
        return group_norm_silu_reference(x.to(wide), groups, weight, bias, eps, silu).to(x.dtype)
    normed = torch.group_norm(x, groups, weight, bias, eps)  # nn.functional's rejects a single element
    return F.silu(normed) if silu else normed
