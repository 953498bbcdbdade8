"""Reference implementation of the norm and rotation of queries and keys, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.kernels.adaln.reference import rms_norm

__all__ = ["qk_norm_rope_reference", "references"]


def qk_norm_rope_reference(
    query: Tensor,
    key: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    axes: tuple[int, ...] | None = None,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """Reference implementation."""
    vectors = (query_weight, key_weight, query_bias, key_bias)
    return references(query, key, cos, sin, positions, axes or query.shape[-1:], vectors, norm, eps, interleaved)


def references(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    cos, sin, positions, axes, (query_weight, key_weight, query_bias, key_bias), norm, eps, interleaved = rest
    tables, options = (cos, sin, positions, axes), (norm, eps, interleaved)
    return (
        _reference(query, *tables, query_weight, query_bias, *options),
        _reference(key, *tables, key_weight, key_bias, *options),
    )


def _reference(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    axes: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
) -> Tensor:
    dtype = x.dtype
    if norm == "rms":
        x = rms_norm(x, weight, eps)
        x = x if bias is None else x + bias
    elif norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if cos is None or sin is None:
        return x.to(dtype)
    cos, sin = (_looked_up(table, positions, axes).unsqueeze(-2) for table in (cos, sin))
    x = x if x.dtype == torch.float64 else x.float()
    if x.device.type == "cpu" and x.dtype == cos.dtype == sin.dtype and not torch.compiler.is_compiling():
        return _as_complex(x, cos, sin, interleaved).to(dtype)
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(dtype)


def _as_complex(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The rotation as complex products: on a CPU 2 times (halves) to 6 times (interleaved) faster.

    Compilers fuse the real form and cannot fuse this one.
    """
    if not x.numel():  # torch 2.13 has no complex view of an empty tensor
        return x.clone()
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
    return (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)


def _looked_up(table: Tensor, positions: Tensor | None, axes: tuple[int, ...]) -> Tensor:
    """Rows of a table [(n,) P, d / 2] for each token, [(n,) L, d / 2]."""
    if positions is None:
        return table
    places = positions.unsqueeze(-1) if len(axes) == 1 else positions
    columns = table.split([width // 2 for width in axes], dim=-1)
    parts = []
    for axis, part in enumerate(columns):
        place = places[..., axis]
        if part.ndim == 2:
            parts.append(part.index_select(0, place.flatten()).unflatten(0, place.shape))
        else:
            place = place.expand(len(part), -1).unsqueeze(-1).expand(-1, -1, part.shape[-1])
            parts.append(part.gather(1, place.long()))
    return torch.cat(parts, dim=-1)
