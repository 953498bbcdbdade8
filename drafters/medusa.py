"""Medusa-style heads (arXiv 2401.10774): one prediction for each of the next places, from the root, without attention.

Head k passes the target's last feature and the root's token through its own residual block and the target's frozen
head. All nodes at a depth share one distribution, so a tree costs one small pass.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from fastgen.drafters.cache import KVCache
from fastgen.drafters.drafter import Drafter, DraftState, describe
from fastgen.drafters.targets import Prefix, Target, TargetPass

__all__ = ["MedusaDrafter"]


class MedusaDrafter(ModelMixin, ConfigMixin, Drafter):
    """See the module.

    Args:
        hidden_size, vocab_size, target_layers: of the target.
        depth: number of heads, the deepest node that can be drafted.
        width: of the residual blocks; None takes half the target's.

    Raises:
        ValueError: depth below 1.
    """

    @register_to_config
    def __init__(
        self, hidden_size: int, vocab_size: int, target_layers: int, depth: int = 4, width: int | None = None
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth: {depth} is not allowed, needs >= 1")
        width = width or hidden_size // 2
        self.max_depth = depth
        self.norm = nn.RMSNorm(2 * hidden_size, eps=1e-5)
        self.down = nn.ModuleList(nn.Linear(2 * hidden_size, width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, hidden_size) for _ in range(depth))
        for layer in self.up:  # every head starts as the target's own
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    @classmethod
    def for_target(cls, target: Target, **config: Any) -> MedusaDrafter:
        """An untrained drafter with the target's sizes."""
        return cls(**{**describe(target), **config})

    def features(self, output: TargetPass) -> Tensor:
        return output.hidden

    def guess(self, features: Tensor, embeds: Tensor, depth: int) -> Tensor:
        """Feature [R, n, D] that head `depth` predicts from features [R, n, D] and embeddings of the next tokens."""
        both = self.norm(torch.cat([features, embeds.to(features.dtype)], dim=-1))
        predicted: Tensor = features + self.up[depth](nn.functional.silu(self.down[depth](both)))
        return predicted

    def start(self, target: Target, prefix: Prefix, features: Tensor, first: Tensor, room: int) -> DraftState:
        nothing = KVCache.allocate(0, prefix.mask[:, :0], 0, 1, 1, features.dtype)
        embeds = target.both_rows(target.embed(first[:, None]), prefix)
        return DraftState(target, prefix, nothing, torch.cat([features[:, -1:], embeds], dim=-1))

    def absorb(self, state: DraftState, tokens: Tensor, features: Tensor, count: Tensor) -> None:
        last = state.target.both_rows((count - 1).clamp_min(0), state.prefix)[:, None]
        feature = features.gather(1, last[..., None].expand(-1, -1, features.shape[-1]))
        token = state.target.both_rows(tokens, state.prefix).gather(1, last)
        state.root = torch.cat([feature, state.target.embed(token)], dim=-1)

    def grow(
        self, state: DraftState, tokens: Tensor, parents: Tensor, depth: Tensor, mask: Tensor, first: int
    ) -> Tensor:
        # The prediction depends on the root and the depth, not on the node.
        return state.root.expand(-1, tokens.shape[1], -1)

    def logits(self, state: DraftState, hidden: Tensor, depth: int) -> Tensor:
        feature, embeds = hidden[:, :1].chunk(2, dim=-1)
        return state.target.head(self.guess(feature, embeds, depth)).expand(-1, hidden.shape[1], -1)
