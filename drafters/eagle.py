"""EAGLE drafters: one decoder layer that continues the target's own features.

Variant 1 (arXiv 2401.15077) reads the target's last hidden state and predicts the next one; the target's frozen head
turns it into logits. Variant 3 (arXiv 2503.01840) reads the inputs of three layers, has a norm and head of its own,
and feeds its own output back. Both run on the two guidance rows and mix their logits as the target does.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from fastgen.drafters.cache import AttentionMask, KVCache, mask_for_tree
from fastgen.drafters.decoder import Rotary
from fastgen.drafters.drafter import Drafter, DraftState, describe
from fastgen.drafters.targets.base import Prefix, Target, TargetPass
from fastgen.models.layers import GatedMLP, padded_causal_mask, rotate_halves

__all__ = ["EagleDrafter"]


class EagleDrafter(ModelMixin, ConfigMixin, Drafter):
    """See the module.

    Args:
        hidden_size, vocab_size, target_layers: of the target.
        variant: 1 or 3.
        width: of the drafter's layer; None takes the target's, as EAGLE does. A narrower layer is cheaper.
        heads: attention heads.
        intermediate_size: of the MLP; None takes 8/3 of the width.
        taps: layers whose inputs variant 3 reads; None takes layers 2, n // 2 and n - 3 of n (fewer in small targets).
        rope_theta: base of the rotary angles.

    Raises:
        ValueError: unknown variant, or a width that the heads do not divide.
    """

    @register_to_config
    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        target_layers: int,
        variant: Literal[1, 3] = 1,
        width: int | None = None,
        heads: int = 4,
        intermediate_size: int | None = None,
        taps: tuple[int, ...] | None = None,
        rope_theta: float = 10_000.0,
    ) -> None:
        super().__init__()
        width = width or hidden_size
        if variant not in (1, 3):
            raise ValueError(f"variant: {variant!r} is not allowed, needs 1 or 3")
        if width % (2 * heads):
            raise ValueError(f"width: {width} is not a multiple of twice the {heads} heads")
        if variant == 3:
            middle = (min(2, target_layers - 1), target_layers // 2, max(target_layers - 3, target_layers // 2))
            self.taps = tuple(sorted(set(taps or middle)))
        read = hidden_size * (len(self.taps) if variant == 3 else 1)
        self.read = nn.Linear(read, width, bias=False)
        self.embed_proj = nn.Linear(hidden_size, width, bias=False)
        inner = intermediate_size or int(width * 8 / 3 + 15) // 16 * 16
        qkv = 2 * width if variant == 3 else width
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(qkv, width, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(width, width, bias=False)
        self.mlp = GatedMLP(width, inner)
        self.norm_mlp = nn.RMSNorm(width, eps=1e-5)
        if variant == 3:
            self.norm_embed, self.norm_hidden = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
            self.norm_out = nn.RMSNorm(width, eps=1e-5)
            self.head = nn.Linear(width, vocab_size, bias=False)
        else:
            self.fuse = nn.Linear(2 * width, width, bias=False)
            self.write = nn.Identity() if width == hidden_size else nn.Linear(width, hidden_size, bias=False)
        self.head_dim = width // heads

    @classmethod
    def for_target(cls, target: Target, **config: Any) -> EagleDrafter:
        """An untrained drafter with the target's sizes."""
        return cls(**{**describe(target), **config})

    # ---- Drafter ----

    def features(self, output: TargetPass) -> Tensor:
        return torch.cat(output.taps, dim=-1) if self.config.variant == 3 else output.hidden

    def start(self, target: Target, prefix: Prefix, features: Tensor, first: Tensor, room: int) -> DraftState:
        length = prefix.mask.shape[1]
        heads, dtype = self.config.heads, features.dtype
        slots_behind = target.num_tokens + room
        cache = KVCache.allocate(1, prefix.mask, slots_behind, heads, self.head_dim, dtype, prefix.static)
        embeds = torch.cat([prefix.embeds[:, 1:], target.both_rows(target.embed(first[:, None]), prefix)], dim=1)
        slots = torch.arange(length, device=features.device).expand(len(embeds), -1)
        mask = padded_causal_mask(prefix.mask)
        hidden = self.layer(embeds, self.read(features), prefix.positions, cache, slots, mask)
        cache.advance(length, length)
        return DraftState(target, prefix, cache, hidden[:, -1:].contiguous())

    def absorb(self, state: DraftState, tokens: Tensor, features: Tensor, count: Tensor) -> None:
        m = tokens.shape[1]
        causal = torch.ones(1, m, m, dtype=torch.bool, device=tokens.device).tril()
        depth = torch.arange(m, device=tokens.device)
        hidden = self._step(state, tokens, self.read(features), depth, causal, 0)
        rows = state.target.both_rows(count, state.prefix)
        state.root = hidden.gather(1, (rows - 1).clamp_min(0)[:, None, None].expand(-1, 1, hidden.shape[-1]))
        state.cache.advance(rows, m)

    def grow(
        self, state: DraftState, tokens: Tensor, parents: Tensor, depth: Tensor, mask: Tensor, first: int
    ) -> Tensor:
        hidden = parents if self.config.variant == 3 else self.read(parents)
        # The root's own entry is the last committed one: a child of the root comes right after it.
        return self._step(state, tokens, hidden, depth - 1, mask, first)

    def logits(self, state: DraftState, hidden: Tensor, depth: int) -> Tensor:
        return self.logits_of(state.target, hidden)

    def logits_of(self, target: Target, hidden: Tensor) -> Tensor:
        """Logits [..., V] of states, from the drafter's own head (variant 3) or the target's."""
        return self.head(self.norm_out(hidden)) if self.config.variant == 3 else target.head(hidden)

    # ---- the layer ----

    def _step(
        self, state: DraftState, tokens: Tensor, hidden: Tensor, ahead: Tensor, mask: Tensor, first: int
    ) -> Tensor:
        """Run the layer on tokens [B, k] that are `ahead` positions after the committed ones."""
        target, prefix, cache, k = state.target, state.prefix, state.cache, tokens.shape[1]
        embeds = target.both_rows(target.embed(tokens), prefix)
        committed = cache.lengths - prefix.mask.shape[1]
        ahead = target.both_rows(ahead.expand(len(tokens), k), prefix)
        positions = (prefix.offset + committed)[:, None] + ahead
        slots = cache.lengths[:, None] + first + torch.arange(k, device=tokens.device)
        visible = mask_for_tree(cache, target.both_trees(mask, prefix))
        return self.layer(embeds, hidden, positions, cache, slots, visible)

    def layer(
        self, embeds: Tensor, hidden: Tensor, positions: Tensor, cache: KVCache, slots: Tensor, mask: AttentionMask
    ) -> Tensor:
        """One step of the drafter.

        Args:
            embeds: [R, k, D], the target's embeddings of the tokens.
            hidden: [R, k, width] of the token before: a projected feature, or this layer's own output.
            positions, slots: [R, k].
            cache: written at `slots`.
            mask: [R, 1, k, limit], or a `TreeMask`.

        Returns:
            [R, k, hidden_size] the predicted feature (variant 1), or [R, k, width] (variant 3).
        """
        stream, query, key, value = self.project(embeds, hidden, self.rotary(positions, hidden.dtype))
        return self.finish(stream, cache.attend(0, query, key, value, slots, mask))

    def project(self, embeds: Tensor, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The residual stream [R, k, width], and query, key and value [R, k, heads, head_dim], rotated."""
        embeds = self.embed_proj(embeds)
        if self.config.variant == 3:
            stream = hidden
            fused = torch.cat([self.norm_embed(embeds), self.norm_hidden(hidden)], dim=-1)
        else:
            stream = fused = self.fuse(torch.cat([embeds, hidden], dim=-1))
        shape = (*fused.shape[:2], -1, self.head_dim)
        query, key, value = (part(fused).view(shape) for part in (self.q_proj, self.k_proj, self.v_proj))
        return stream, rotate_halves(query, rotary), rotate_halves(key, rotary), value

    def finish(self, stream: Tensor, mixed: Tensor) -> Tensor:
        """The layer's output: add the attention [R, k, heads, head_dim] to the stream, then the feed-forward."""
        stream = stream + self.o_proj(mixed.flatten(2))
        stream = stream + self.mlp(self.norm_mlp(stream))
        return stream if self.config.variant == 3 else self.write(stream)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """Cosines and sines of positions [R, k]."""
        # Not a buffer: this module's forward is never called, so offload hooks would not move it to the device.
        powers = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=positions.device) / self.head_dim
        angles = positions[..., None].float() * (self.config.rope_theta**-powers).float()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)
