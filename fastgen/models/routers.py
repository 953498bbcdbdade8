"""Routers of DC-DiT (arXiv 2603.06351): the probability of each grid position to be kept as a boundary token."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RouterKind = Literal["predictability", "cosine"]
ROUTERS: tuple[RouterKind, ...] = ("predictability", "cosine")


class SurroundConv2d(nn.Conv2d):
    """A 3x3 convolution that may leave out the position in its middle.

    Args:
        channels: in and out.
        center_tap: whether the middle counts.
    """

    taps: Tensor

    def __init__(self, channels: int, center_tap: bool) -> None:
        super().__init__(channels, channels, 3)
        taps = torch.ones(3, 3)
        if not center_tap:
            taps[1, 1] = 0
        self.register_buffer("taps", taps, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.conv2d(hidden, self.weight * self.taps, self.bias)


class PredictabilityRouter(nn.Module):
    """A position that its neighbours do not predict is a boundary.

    Features are projected to a bottleneck z; a 3x3 convolution predicts each z from around it, and a small
    convolutional scorer turns the residual r = z - z_hat into one logit.

    Args:
        width: of the features.
        bottleneck: channels of z.
        center_tap: whether the predictor sees the very position it predicts (the paper leaves it open; without it a
            feature cannot predict itself).
    """

    def __init__(self, width: int, bottleneck: int, center_tap: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, bottleneck)
        self.predictor = SurroundConv2d(bottleneck, center_tap)
        self.scorer = nn.Conv2d(bottleneck, bottleneck, 3)
        self.head = nn.Conv2d(bottleneck, 1, 1)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logits [n, L], float32 or wider, of features [n, L, width] on a grid (H, W)."""
        z = self.proj(self.norm(tokens)).transpose(1, 2).unflatten(2, grid)
        predicted = self.predictor(_padded(z))
        score = self.head(F.silu(self.scorer(_padded(z - predicted))))
        return _wide(score.flatten(1))


class CosineRouter(nn.Module):
    """v1's alternative: p = (1 - mean cosine similarity to the neighbours' keys) / 2.

    Args:
        width: of the features.
        bottleneck: width of queries and keys.
    """

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, bottleneck, bias=False)
        self.to_k = nn.Linear(width, bottleneck, bias=False)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logits [n, L], float32 or wider, of features [n, L, width] on a grid (H, W)."""
        normed = self.norm(tokens)
        q, k = (
            F.normalize(_wide(layer(normed)), dim=-1).transpose(1, 2).unflatten(2, grid)
            for layer in (self.to_q, self.to_k)
        )
        # The sum of the neighbours' keys, and how many there are: at the edge of the grid fewer.
        ones = torch.ones(3, 3, device=q.device, dtype=q.dtype)
        ones[1, 1] = 0
        around = F.conv2d(k, ones.expand(k.shape[1], 1, 3, 3), padding=1, groups=k.shape[1])
        count = F.conv2d(torch.ones_like(q[:1, :1]), ones.expand(1, 1, 3, 3), padding=1).clamp(min=1)
        similarity = (q * around).sum(dim=1) / count[0]
        probability = ((1 - similarity) / 2).clamp(1e-6, 1 - 1e-6)
        return torch.logit(probability).flatten(1)


def _padded(z: Tensor) -> Tensor:
    """One cell more on each side, with the values of the edge: a zero border would be a surprise to the predictor."""
    return F.pad(z, (1, 1, 1, 1), mode="replicate")


def build_router(kind: RouterKind, width: int, bottleneck: int, center_tap: bool = False) -> nn.Module:
    """A router by name.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "predictability":
        return PredictabilityRouter(width, bottleneck, center_tap)
    if kind == "cosine":
        return CosineRouter(width, bottleneck)
    raise ValueError(f"router: {kind!r} is unknown; choose one of {', '.join(ROUTERS)}")


def _wide(values: Tensor) -> Tensor:
    """In float32; values in float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
