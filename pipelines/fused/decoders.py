"""Forward passes of VAE and VQ decoders with group norm and SiLU in one, on images whose channels are neighbours.

As in `fastgen.pipelines.fused.blocks`. Loss contract: exact, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder, JanusVQVAEResnetBlock

from fastgen.kernels.group_norm_silu import group_norm_silu
from fastgen.pipelines.fused.norms import runs

__all__ = ["DECODERS", "fits"]


def _channels_last(image: Tensor) -> Tensor:
    """So laid out, convolutions leave their results in the same layout. (That of one channel says nothing of it.)"""
    return image.contiguous(memory_format=torch.channels_last)


def _normed(hidden: Tensor, norm: Any) -> Tensor:
    return group_norm_silu(_channels_last(hidden), norm.num_groups, norm.weight, norm.bias, norm.eps, True)


def _runs(hidden: Tensor, *norms: nn.Module) -> bool:
    # The kernel has no backward; the reference inside would be the stock one with another layout.
    return runs(hidden, *norms) and not torch.is_grad_enabled()


def _resnet(self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    """A residual block without a timestep."""
    if temb is not None or args or kwargs or not _runs(input_tensor, self.norm1, self.norm2):
        return ResnetBlock2D.forward(self, input_tensor, temb, *args, **kwargs)
    hidden = self.conv1(_normed(input_tensor, self.norm1))
    hidden = self.conv2(self.dropout(_normed(hidden, self.norm2)))
    if self.conv_shortcut is not None:
        input_tensor = self.conv_shortcut(input_tensor)
    return (input_tensor + hidden) / self.output_scale_factor


def _decoder(self: Any, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
    """Decoder of `AutoencoderKL`."""
    if latent_embeds is not None or not _runs(sample, self.conv_norm_out):
        return Decoder.forward(self, sample, latent_embeds)
    hidden = self.mid_block(_channels_last(self.conv_in(_channels_last(sample))), None)
    for block in self.up_blocks:
        hidden = block(hidden, None)
    hidden = self.conv_out(_normed(hidden, self.conv_norm_out))
    return hidden.contiguous()  # callers may view it


def _encoder(self: Any, sample: Tensor) -> Tensor:
    """Encoder of `AutoencoderKL`."""
    if not _runs(sample, self.conv_norm_out):
        return Encoder.forward(self, sample)
    hidden = _channels_last(self.conv_in(_channels_last(sample)))
    for block in self.down_blocks:
        hidden = block(hidden)
    hidden = self.conv_out(_normed(self.mid_block(hidden), self.conv_norm_out))
    return hidden.contiguous()


def _vq_resnet(self: Any, hidden_states: Tensor) -> Tensor:
    """A residual block of Janus' and LlamaGen's image tokenizer."""
    if not _runs(hidden_states, self.norm1, self.norm2):
        return JanusVQVAEResnetBlock.forward(self, hidden_states)
    hidden = self.conv1(_normed(hidden_states, self.norm1))
    hidden = self.conv2(self.dropout(_normed(hidden, self.norm2)))
    if self.in_channels != self.out_channels:
        hidden_states = (self.conv_shortcut if self.use_conv_shortcut else self.nin_shortcut)(hidden_states)
    return hidden_states + hidden


def _vq_decoder(self: Any, hidden_state: Tensor) -> Tensor:
    """Its decoder."""
    if not _runs(hidden_state, self.norm_out):
        return JanusVQVAEDecoder.forward(self, hidden_state)
    hidden = self.mid(_channels_last(self.conv_in(_channels_last(hidden_state))))
    for level, stage in enumerate(self.up):
        for index, block in enumerate(stage.block):
            hidden = block(hidden)
            if len(stage.attn) > 0:
                hidden = stage.attn[index](hidden)
        if level != self.num_resolutions - 1:
            hidden = stage.upsample(hidden)
    hidden = self.conv_out(_normed(hidden, self.norm_out))
    return hidden.contiguous()


DECODERS: dict[type, Callable[..., Any]] = {
    ResnetBlock2D: _resnet,
    Decoder: _decoder,
    Encoder: _encoder,
    JanusVQVAEResnetBlock: _vq_resnet,
    JanusVQVAEDecoder: _vq_decoder,
}
"""Module -> its fused forward."""


def fits(module: Any) -> bool:
    """Whether the fused forward of its class serves this module."""
    if isinstance(module, ResnetBlock2D):
        plain = module.upsample is None and module.downsample is None and module.time_emb_proj is None
        return (
            plain
            and module.time_embedding_norm != "scale_shift"
            and _silu(module.nonlinearity)
            and _groups(module.norm1)
        )
    if isinstance(module, (Decoder, Encoder)):
        return _groups(module.conv_norm_out) and _silu(module.conv_act)
    return True


def _silu(module: Any) -> bool:
    return isinstance(module, nn.SiLU)


def _groups(module: Any) -> bool:
    return isinstance(module, nn.GroupNorm)
