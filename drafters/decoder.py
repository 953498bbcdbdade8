"""Decoder layers of transformers models with our KV cache.

The layers' own sub-modules run (projections, norms, feed-forward), so LoRA, quantisation and offload hooks keep
working. Only the attention is ours: over committed slots and a tree, which no `generate` offers. One function serves
Llama-like models, Chameleon (query and key norms, norms after the branch), GLM-Image (norms before and after it), and
our LlamaGen and drafters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgen.drafters.cache import AttentionMask, KVCache
from fastgen.drafters.offload import group_hook
from fastgen.models.layers import rotate_halves, rotate_pairs

__all__ = ["DecoderLayer", "Rotary", "RotaryTable", "layers_of", "run_layers"]

RotaryStyle = Literal["halves", "pairs"]
Rotary = tuple[Tensor, Tensor]
"""Cosines and sines [R, n, head_dim], or [R, n, head_dim / 2] in style "pairs"."""


@dataclass(frozen=True)
class DecoderLayer:
    """The parts of one layer.

    Attributes:
        query, key, value, output: linear maps of the attention.
        feed_forward: the MLP.
        norm1, norm2: of attention and feed-forward.
        query_norm, key_norm: on [R n, heads, head_dim], or None.
        head_dim: width of a head.
        rotary: "halves" rotates feature i with i + d/2 (transformers), "pairs" 2 i with 2 i + 1 (LlamaGen).
        norm_after: the norms apply to a branch's output, not its input (Chameleon's "swin" layers).
        after1, after2: further norms on the outputs of attention and feed-forward (GLM-Image), or None.
        block: the layer itself; its forward is not called.
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    feed_forward: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    head_dim: int
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None
    rotary: RotaryStyle = "halves"
    norm_after: bool = False
    after1: nn.Module | None = None
    after2: nn.Module | None = None
    block: nn.Module | None = None


def layers_of(model: Any, rotary: RotaryStyle = "halves") -> list[DecoderLayer]:
    """Views of the layers of a transformers decoder (`LlamaModel`, `Emu3TextModel`, `ChameleonModel` …), or of our
    LlamaGen, whose layers contain the attention directly.

    Raises:
        ValueError: a layer lacks a part that we need.
    """
    views = []
    for layer in model.layers:
        attention = getattr(layer, "self_attn", layer)
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        if any(not hasattr(attention, name) for name in names) or not hasattr(layer, "mlp"):
            raise ValueError(f"target: layers of {type(model).__name__} are not supported")
        views.append(
            DecoderLayer(
                attention.q_proj,
                attention.k_proj,
                attention.v_proj,
                attention.o_proj,
                feed_forward=layer.mlp,
                norm1=layer.input_layernorm,
                norm2=layer.post_attention_layernorm,
                head_dim=attention.head_dim,
                query_norm=getattr(attention, "q_norm", None),
                key_norm=getattr(attention, "k_norm", None),
                rotary=rotary,
                norm_after=type(layer).__name__ == "ChameleonSwinDecoderLayer",
                after1=getattr(layer, "post_self_attn_layernorm", None),
                after2=getattr(layer, "post_mlp_layernorm", None),
                block=layer,
            )
        )
    return views


class RotaryTable:
    """Rotary factors of a transformers decoder by position, computed once if they do not depend on the length.

    Args:
        embedding: its `rotary_emb`.
        length: number of positions; later ones, which only nodes past the end of a picture have, use the last.
    """

    def __init__(self, embedding: Any, length: int) -> None:
        self.embedding, self.length = embedding, length
        self._table: Rotary | None = None

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """Cosines and sines [R, n, head_dim] of positions [R, n]."""
        anything = torch.empty(0, dtype=dtype, device=positions.device)
        if self.embedding.rope_type != "default":  # some types depend on the longest position
            cos, sin = self.embedding(anything, positions)
            return cos, sin
        table = self._table
        if table is None or table[0].device != positions.device or table[0].dtype != dtype:
            everywhere = torch.arange(self.length, device=positions.device)[None]
            cos, sin = self.embedding(anything, everywhere)
            table = self._table = (cos[0], sin[0])
        positions = positions.clamp_max(self.length - 1)
        return table[0][positions], table[1][positions]


def run_layers(
    layers: list[DecoderLayer],
    hidden: Tensor,
    rotary: Rotary | None,
    cache: KVCache,
    slots: Tensor,
    mask: AttentionMask,
    taps: tuple[int, ...] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Run layers on new tokens and write their keys and values.

    Args:
        layers: of the decoder.
        hidden: [R, n, D].
        rotary: factors of the tokens' positions, or None.
        cache: earlier keys and values; `slots` are written first, so a token sees itself.
        slots: [R, n] int64.
        mask: [R, 1, n, limit] bool over the first slots, of which every row sees at least one; or a `TreeMask`.
        taps: layers whose inputs are also returned.

    Returns:
        [R, n, D], and the inputs of layers `taps`.
    """
    tapped = {}
    for index, layer in enumerate(layers):
        if index in taps:
            tapped[index] = hidden
        offload = group_hook(layer.block)
        if offload is not None:
            offload.pre_forward(layer.block)
        branch = hidden if layer.norm_after else layer.norm1(hidden)
        branch = _attend(layer, index, branch, rotary, cache, slots, mask)
        branch = branch if layer.after1 is None else layer.after1(branch)
        hidden = hidden + (layer.norm1(branch) if layer.norm_after else branch)
        branch = layer.feed_forward(hidden if layer.norm_after else layer.norm2(hidden))
        branch = branch if layer.after2 is None else layer.after2(branch)
        hidden = hidden + (layer.norm2(branch) if layer.norm_after else branch)
        if offload is not None:
            offload.post_forward(layer.block, hidden)
    return hidden, [tapped[index] for index in taps]


def _attend(
    layer: DecoderLayer,
    index: int,
    hidden: Tensor,
    rotary: Rotary | None,
    cache: KVCache,
    slots: Tensor,
    mask: AttentionMask,
) -> Tensor:
    shape = (*hidden.shape[:2], -1, layer.head_dim)
    query, key, value = (part(hidden).view(shape) for part in (layer.query, layer.key, layer.value))
    if layer.query_norm is not None and layer.key_norm is not None:
        query = layer.query_norm(query.flatten(0, 1)).view(shape)
        key = layer.key_norm(key.flatten(0, 1)).view(shape)
    if rotary is not None:
        turn = rotate_halves if layer.rotary == "halves" else rotate_pairs
        query, key = turn(query, rotary), turn(key, rotary)
    output: Tensor = layer.output(cache.attend(index, query, key, value, slots, mask).flatten(2))
    return output
