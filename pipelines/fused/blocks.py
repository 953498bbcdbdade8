"""Forward passes of stock transformer blocks in which a gated residual, the norm after it and its modulation are one.

Each is a function of a block and the stock arguments; it calls the stock forward where kernels do not run (on a CPU)
or an argument is one it does not know. Loss contract: exact, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from torch import Tensor

from fastgen.pipelines.fused.norms import norm_of, normed, residual, runs

__all__ = ["BLOCKS", "fits"]

# Looked up here: diffusers marks these classes as operators of compilers, which then trace no attribute of them.
_STOCK_DIT = BasicTransformerBlock.forward
_STOCK_FLUX = FluxTransformerBlock.forward
_STOCK_FLUX_SINGLE = FluxSingleTransformerBlock.forward
_STOCK_SD3 = JointTransformerBlock.forward
_STOCK_QWEN = QwenImageTransformerBlock.forward
_STOCK_Z_IMAGE = ZImageTransformerBlock.forward
_LIMIT = 65504  # float16: stock blocks clip to it


def _clipped(hidden: Tensor) -> Tensor:
    return hidden.clip(-_LIMIT, _LIMIT) if hidden.dtype == torch.float16 else hidden


def _dit(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """DiT: adaLN-Zero, self-attention only."""
    known = self._chunk_size is None and not cross_attention_kwargs and hidden_states.ndim == 3
    if not known or not runs(hidden_states, self.norm1.norm, self.norm3):
        return _STOCK_DIT(
            self,
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            timestep,
            cross_attention_kwargs,
            class_labels,
            added_cond_kwargs,
        )
    first = self.norm1
    condition = first.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
    shift1, scale1, gate1, shift2, scale2, gate2 = first.linear(first.silu(condition)).chunk(6, dim=1)
    attended = self.attn1(normed(hidden_states, first.norm, scale1, shift1), attention_mask=attention_mask)
    hidden_states, between = residual(hidden_states, attended, gate1, self.norm3, scale2, shift2)
    return residual(hidden_states, self.ff(between), gate2)[0]


def _joint_ends(
    streams: list[tuple[Tensor, Tensor, list[Tensor], Any, Any]],
) -> list[Tensor]:
    """The outputs of streams (hidden, attention's output, [gate, shift, scale, gate], norm, feed-forward)."""
    outputs = []
    for hidden, attended, (gate1, shift, scale, gate2), norm, feed_forward in streams:
        hidden, between = residual(hidden, attended, gate1, norm, scale, shift)
        outputs.append(residual(hidden, feed_forward(between), gate2)[0])
    return outputs


def _flux(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """FLUX, text and image apart."""
    arguments = joint_attention_kwargs or {}
    known = temb.ndim == 2 and not arguments.keys() & {"ip_hidden_states", "ip_adapter_masks"}
    if not known or not runs(hidden_states):
        return _STOCK_FLUX(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
    starts, rest = [], []
    for hidden, first in ((hidden_states, self.norm1), (encoder_hidden_states, self.norm1_context)):
        shift, scale, *later = first.linear(first.silu(temb)).chunk(6, dim=1)
        starts.append(normed(hidden, first.norm, scale, shift))
        rest.append(later)
    attended = self.attn(
        hidden_states=starts[0], encoder_hidden_states=starts[1], image_rotary_emb=image_rotary_emb, **arguments
    )
    image, text = _joint_ends(
        [
            (hidden_states, attended[0], rest[0], self.norm2, self.ff),
            (encoder_hidden_states, attended[1], rest[1], self.norm2_context, self.ff_context),
        ]
    )
    return _clipped(text), image


def _flux_single(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """FLUX, text and image in one stream, attention and feed-forward in parallel."""
    if temb.ndim != 2 or not runs(hidden_states):
        return _STOCK_FLUX_SINGLE(
            self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
        )
    length = encoder_hidden_states.shape[1]
    hidden = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = self.norm.linear(self.norm.silu(temb)).chunk(3, dim=1)
    start = normed(hidden, self.norm.norm, scale, shift)
    fed = self.act_mlp(self.proj_mlp(start))
    attended = self.attn(hidden_states=start, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    hidden = _clipped(residual(hidden, self.proj_out(torch.cat([attended, fed], dim=2)), gate)[0])
    return hidden[:, :length], hidden[:, length:]


def _sd3(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Stable Diffusion 3 and 3.5, where some blocks have a second attention over only the image."""
    if self._chunk_size is not None or temb.ndim != 2 or not runs(hidden_states):
        return _STOCK_SD3(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
    arguments = joint_attention_kwargs or {}
    first, second = self.norm1, self.norm1_context
    shift, scale, gate1, shift2, scale2, gate2, *dual = first.linear(first.silu(temb)).chunk(
        9 if self.use_dual_attention else 6, dim=1
    )
    start = normed(hidden_states, first.norm, scale, shift)
    if self.context_pre_only:
        # Its condition may be wider than the text; the order of the halves is the other one.
        condition = second.linear(second.silu(temb).to(encoder_hidden_states.dtype))
        text_scale, text_shift = condition.chunk(2, dim=1)
        text_rest: list[Tensor] = []
    else:
        text_shift, text_scale, *text_rest = second.linear(second.silu(temb)).chunk(6, dim=1)
    text_start = normed(encoder_hidden_states, second.norm, text_scale, text_shift)
    attended, text_attended = self.attn(hidden_states=start, encoder_hidden_states=text_start, **arguments)
    if self.use_dual_attention:
        other = self.attn2(hidden_states=normed(hidden_states, first.norm, dual[1], dual[0]), **arguments)
        hidden_states, attended, gate1 = residual(hidden_states, attended, gate1)[0], other, dual[2]
    image = (hidden_states, attended, [gate1, shift2, scale2, gate2], self.norm2, self.ff)
    if self.context_pre_only:
        return None, _joint_ends([image])[0]
    text = (encoder_hidden_states, text_attended, text_rest, self.norm2_context, self.ff_context)
    made = _joint_ends([image, text])
    return made[1], made[0]


def _qwen(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Any = None,
) -> tuple[Tensor, Tensor]:
    """Qwen-Image, without conditioning by token (its editing models)."""
    if self.zero_cond_t or modulate_index is not None or temb.ndim != 2 or not runs(hidden_states):
        return _STOCK_QWEN(
            self,
            hidden_states,
            encoder_hidden_states,
            encoder_hidden_states_mask,
            temb,
            image_rotary_emb,
            joint_attention_kwargs,
            modulate_index,
        )
    image_shift, image_scale, *image_rest = self.img_mod(temb).chunk(6, dim=-1)
    text_shift, text_scale, *text_rest = self.txt_mod(temb).chunk(6, dim=-1)
    attended, text_attended = self.attn(
        hidden_states=normed(hidden_states, self.img_norm1, image_scale, image_shift),
        encoder_hidden_states=normed(encoder_hidden_states, self.txt_norm1, text_scale, text_shift),
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    image, text = _joint_ends(
        [
            (hidden_states, attended, image_rest, self.img_norm2, self.img_mlp),
            (encoder_hidden_states, text_attended, text_rest, self.txt_norm2, self.txt_mlp),
        ]
    )
    return _clipped(text), _clipped(image)


def _z_image(
    self: Any,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: Tensor,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
) -> Tensor:
    """Z-Image: weighted RMS norms on both sides of attention and feed-forward, tanh gates."""
    norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
    if noise_mask is not None or not runs(x, *norms):
        return _STOCK_Z_IMAGE(self, x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean)
    scale1 = gate1 = scale2 = gate2 = None
    if self.modulation:
        scale1, gate1, scale2, gate2 = self.adaLN_modulation(adaln_input).chunk(4, dim=1)
    start = normed(x, self.attention_norm1, scale1, None)
    attended = self.attention(start, attention_mask=attn_mask, freqs_cis=freqs_cis)
    x, between = residual(x, attended, gate1, self.ffn_norm1, scale2, tanh_gate=True, **_after(self.attention_norm2))
    return residual(x, self.feed_forward(between), gate2, tanh_gate=True, **_after(self.ffn_norm2))[0]


def _after(norm: Any) -> dict[str, Any]:
    """Arguments of `adaln` for an RMS norm of the update."""
    return {"update_norm": True, "update_weight": norm.weight, "update_eps": norm.eps}


BLOCKS: dict[type, Callable[..., Any]] = {
    BasicTransformerBlock: _dit,
    FluxTransformerBlock: _flux,
    FluxSingleTransformerBlock: _flux_single,
    JointTransformerBlock: _sd3,
    QwenImageTransformerBlock: _qwen,
    ZImageTransformerBlock: _z_image,
}
"""Block -> its fused forward."""


def fits(block: Any) -> bool:
    """Whether the fused forward of its class serves this block, with its norms."""
    if isinstance(block, BasicTransformerBlock):
        plain = block.attn2 is None and block.pos_embed is None and not hasattr(block, "fuser")
        return block.norm_type == "ada_norm_zero" and plain and norm_of(block.norm3) is not None
    if isinstance(block, JointTransformerBlock):
        return isinstance(block.norm1_context, (AdaLayerNormZero, AdaLayerNormContinuous)) and (
            norm_of(block.norm1_context.norm) is not None
        )
    return True
