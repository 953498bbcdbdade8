"""Rotary position embedding in its two layouts, and factors of fractional positions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotary_factors", "rotate_halves", "rotate_pairs"]


def rotate_halves(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate features i and i + r / 2 of [..., n, heads, d] by cosines and sines [..., n, r] (transformers); features
    from r on stay, where r < d."""
    cos, sin = (factor[..., None, :] for factor in rotary)
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([rotate_halves(x[..., :width], rotary), x[..., width:]], dim=-1)
    half = width // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def rotate_pairs(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate features 2 i and 2 i + 1 of [..., n, heads, d] by cosines and sines [..., n, d / 2] (LlamaGen)."""
    cos, sin = (factor[..., None, :] for factor in rotary)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def rotary_factors(places: Tensor, axes_dims: list[int], theta: float) -> Tensor:
    """Cosines and sines [T, sum(axes_dims) / 2, 2] of positions [T, axes], which may be fractions."""
    angles = []
    for axis, width in enumerate(axes_dims):
        powers = torch.arange(0, width, 2, dtype=torch.float64, device=places.device) / width
        angles.append(places[:, axis, None].double() * theta**-powers)
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()
