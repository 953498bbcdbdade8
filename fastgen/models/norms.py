"""Norms whose weights fused operations read.

Hooks of accelerate and diffusers (sequential and group offload, layerwise casting) bring a module's weights in when
its own forward begins and take them away when it ends. So a fused operation may not reach into another module: the
norm either runs the operation in its own forward, or hands its weight out from there.
"""

from __future__ import annotations

from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from fastgen.kernels.group_norm_silu import group_norm_silu

__all__ = ["GroupNormSiLU", "ReadableRMSNorm", "weight_of"]


class GroupNormSiLU(nn.GroupNorm):
    """silu(norm(hidden)) of [n, d, H, W]."""

    def forward(self, hidden: Tensor) -> Tensor:
        return group_norm_silu(hidden, self.num_groups, self.weight, self.bias, self.eps)


class ReadableRMSNorm(RMSNorm):
    """Called without an input, it returns its weight."""

    def forward(self, hidden_states: Tensor | None = None) -> Tensor:
        if hidden_states is None:
            # A view keeps the memory when hooks put other data behind the parameter.
            return self.weight.view_as(self.weight)
        return super().forward(hidden_states)


def weight_of(norm: nn.Module) -> Tensor | None:
    """The weight of a norm, for a fused operation; None for one without."""
    if isinstance(norm, ReadableRMSNorm):
        return norm()
    return getattr(norm, "weight", None)
