"""Rotary position embedding in its two layouts."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotate_halves", "rotate_pairs"]


def rotate_halves(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate features i and i + d / 2 of [..., n, heads, d] by cosines and sines [..., n, d] (transformers)."""
    cos, sin = (factor[..., None, :] for factor in rotary)
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def rotate_pairs(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate features 2 i and 2 i + 1 of [..., n, heads, d] by cosines and sines [..., n, d / 2] (LlamaGen)."""
    cos, sin = (factor[..., None, :] for factor in rotary)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
