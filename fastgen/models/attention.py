"""Attention on processors whose fused kernel is slow."""

from __future__ import annotations

import torch


def fused_backward_is_slow(device: torch.device) -> bool:
    """Whether plain matrix products beat `scaled_dot_product_attention` in training: under bfloat16 autocast on a CPU.

    Measured on one AVX-512 core with bfloat16 units, forward and backward: 16 x 6 heads of 96 tokens 18.8 ms fused,
    4.3 ms plain; 8 x 6 heads of 271 tokens 34.4 and 17.3 ms. In float32 the fused kernel is the faster one.
    """
    return device.type == "cpu" and torch.is_autocast_enabled("cpu")


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Softmax attention without a mask over [n, heads, tokens, head_dim]."""
    if fused_backward_is_slow(query.device):
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)
        return weights.to(value.dtype) @ value
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def padded_causal_mask(visible: torch.Tensor) -> torch.Tensor:
    """Who sees what, [n, 1, L, L] bool: what is visible [n, L] and not later; a pad itself alone, so that nothing is
    undefined."""
    order = torch.arange(visible.shape[1], device=visible.device)
    own = order[:, None] == order
    return (((order[:, None] >= order) & visible[:, None]) | own)[:, None]
