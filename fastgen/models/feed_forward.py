"""The gated feed-forward of Llama-like models."""

from __future__ import annotations

from torch import Tensor, nn


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), no biases.

    Args:
        width: D.
        inner: width inside.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        output: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return output
