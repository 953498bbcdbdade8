"""Attention processors that norm and rotate queries and keys in one launch, for FLUX, SD3, Qwen-Image and Z-Image.

Each wraps the processor it replaced, which it calls where kernels do not run (on a CPU, for arguments that
it does not know). Loss contract: exact, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from torch import Tensor, nn

from fastgen.pipelines.fused.norms import runs, same_norms, turn

__all__ = ["PROCESSORS", "FusedProcessor"]


class FusedProcessor:
    """A processor before the stock one.

    Args:
        stock: what was installed; its attention backend and parallel configuration are kept.
    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    @property
    def _attention_backend(self) -> Any:
        return getattr(self.stock, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.stock._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.stock, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.stock._parallel_config = value

    @staticmethod
    def fits(attention: Any) -> bool:
        """Whether the kernels know the norms of this attention module."""
        pairs = [(attention.norm_q, attention.norm_k)]
        if getattr(attention, "added_kv_proj_dim", None) is not None:
            pairs.append((attention.norm_added_q, attention.norm_added_k))
        return same_norms(*pairs)

    def _runs(self, attention: Any, hidden_states: Tensor) -> bool:
        names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
        return runs(hidden_states, *(getattr(attention, name, None) for name in names))

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over [n, L, heads, d] by the backend of the stock processor; [n, L, heads d]."""
        mixed: Tensor = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return mixed.flatten(2, 3).to(query.dtype)


def _heads(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width))


class FusedFluxProcessor(FusedProcessor):
    """FLUX: text before image in one sequence, rotated together."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        both = encoder_hidden_states is not None
        if not self._runs(attn, hidden_states) or both != (attn.added_kv_proj_dim is not None):
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (_heads(x, attn.head_dim) for x in (query, key, value))
        tables: tuple[Tensor | None, Tensor | None] = (None, None)
        if image_rotary_emb is not None:  # every angle is there twice
            tables = image_rotary_emb[0][:, ::2], image_rotary_emb[1][:, ::2]
        if not both:
            query, key = turn(query, key, (attn.norm_q, attn.norm_k), *tables)
            return self._mix(query, key, value, attention_mask)
        if attn.fused_projections:
            text = attn.to_added_qkv(encoder_hidden_states).chunk(3, dim=-1)
        else:
            text = tuple(layer(encoder_hidden_states) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        text_query, text_key, text_value = (_heads(x, attn.head_dim) for x in text)
        length = text_query.shape[1]
        before = tuple(None if x is None else x[:length] for x in tables)
        after = tuple(None if x is None else x[length:] for x in tables)
        text_query, text_key = turn(text_query, text_key, (attn.norm_added_q, attn.norm_added_k), *before)
        query, key = turn(query, key, (attn.norm_q, attn.norm_k), *after)
        mixed = self._mix(
            torch.cat([text_query, query], dim=1),
            torch.cat([text_key, key], dim=1),
            torch.cat([text_value, value], dim=1),
            attention_mask,
        )
        image = attn.to_out[1](attn.to_out[0](mixed[:, length:].contiguous()))
        return image, attn.to_add_out(mixed[:, :length].contiguous())


class FusedZImageProcessor(FusedProcessor):
    """Z-Image: one sequence, factors as complex numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        if freqs_cis is None or not self._runs(attn, hidden_states):
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
        width = attn.inner_dim // attn.heads
        query, key, value = (_heads(layer(hidden_states), width) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key = turn(query, key, (attn.norm_q, attn.norm_k), *torch.view_as_real(freqs_cis).unbind(-1))
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]
        mixed: Tensor = self._mix(query, key, value, attention_mask)
        for layer in attn.to_out:
            mixed = layer(mixed)
        return mixed


class FusedQwenProcessor(FusedProcessor):
    """Qwen-Image: text and image have separate weights and factors, text comes first."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        known = attention_mask is None and self._runs(attn, hidden_states)
        if encoder_hidden_states is None or image_rotary_emb is None or not known:
            return self.stock(
                attn,
                hidden_states,
                encoder_hidden_states,
                encoder_hidden_states_mask,
                attention_mask,
                image_rotary_emb,
            )
        width, length = attn.inner_dim // attn.heads, encoder_hidden_states.shape[1]
        mask = None
        if encoder_hidden_states_mask is not None:
            seen = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2])
            mask = torch.cat([encoder_hidden_states_mask, seen], dim=1)[:, None, None, :]
        query, key, value = (_heads(layer(hidden_states), width) for layer in (attn.to_q, attn.to_k, attn.to_v))
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_query, text_key, text_value = (_heads(layer(encoder_hidden_states), width) for layer in layers)
        image_factors, text_factors = (torch.view_as_real(factors).unbind(-1) for factors in image_rotary_emb)
        query, key = turn(query, key, (attn.norm_q, attn.norm_k), *image_factors)
        text_query, text_key = turn(text_query, text_key, (attn.norm_added_q, attn.norm_added_k), *text_factors)
        mixed = self._mix(
            torch.cat([text_query, query], dim=1),
            torch.cat([text_key, key], dim=1),
            torch.cat([text_value, value], dim=1),
            mask,
        )
        image = mixed[:, length:].contiguous()
        for layer in attn.to_out:
            image = layer(image)
        return image, attn.to_add_out(mixed[:, :length].contiguous())


class FusedJointProcessor(FusedProcessor):
    """Stable Diffusion 3: no rotation, image before text."""

    @staticmethod
    def fits(attention: Any) -> bool:
        """Also whether there is a norm at all."""
        return attention.norm_q is not None and FusedProcessor.fits(attention)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if args or kwargs or not self._runs(attn, hidden_states):
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        width = attn.inner_dim // attn.heads
        query, key, value = (_heads(layer(hidden_states), width) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key = turn(query, key, (attn.norm_q, attn.norm_k))
        length = hidden_states.shape[1]
        if encoder_hidden_states is not None:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_query, text_key, text_value = (_heads(layer(encoder_hidden_states), width) for layer in layers)
            text_query, text_key = turn(text_query, text_key, (attn.norm_added_q, attn.norm_added_k))
            pairs = ((query, text_query), (key, text_key), (value, text_value))
            query, key, value = (torch.cat(pair, dim=1) for pair in pairs)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).flatten(2).to(query.dtype)
        image = attn.to_out[1](attn.to_out[0](mixed[:, :length]))
        if encoder_hidden_states is None:
            return image
        text = mixed[:, length:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


PROCESSORS: dict[type, type[FusedProcessor]] = {
    FluxAttnProcessor: FusedFluxProcessor,
    ZSingleStreamAttnProcessor: FusedZImageProcessor,
    QwenDoubleStreamAttnProcessor2_0: FusedQwenProcessor,
    JointAttnProcessor2_0: FusedJointProcessor,
}
"""Stock processor -> its wrapper."""
