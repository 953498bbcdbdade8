"""`ZImageTransformer2DModel` over a whole batch of equal images at once.

The stock forward takes lists and patchifies, pads and concatenates image by image. For images of one size and
captions padded to one length the same arithmetic runs on batched tensors: equal to the stock forward up to rounding,
and faster to train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import Attention

from fastgen.kernels.qk_norm_rope import qk_norm_rope
from fastgen.models.layers import attend
from fastgen.models.norms import weight_of

if TYPE_CHECKING:
    from diffusers import ZImageTransformer2DModel

SEQUENCE_MULTIPLE = 32
"""Z-Image pads captions and images to multiples of this many tokens."""


class RealRotaryProcessor:
    """Z-Image's attention with rotary factors as real numbers: the same arithmetic, which `torch.compile` can fuse.

    It takes `freqs_cis` as cosines and sines [1, tokens, head_dim / 2, 2] in place of complex numbers. Set it with
    `use_real_rotary`; the stock forward of that model then no longer works.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention over [n, tokens, dim]; no mask, no cross attention."""
        if freqs_cis is None or attention_mask is not None or encoder_hidden_states is not None:
            raise ValueError("RealRotaryProcessor takes rotary factors, no mask and no encoder states")
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = turn(query, key, freqs_cis, attn.norm_q, attn.norm_k)
        output = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return attn.to_out[0](output.transpose(1, 2).flatten(2, 3))


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """The 2x2 patches of latents [n, C, 2 h, 2 w] as tokens [n, h w, 4 C], in the order of the stock patchify."""
    n, channels, height, width = latents.shape
    patches = latents.reshape(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(n, -1, 4 * channels)


def turn(
    query: torch.Tensor, key: torch.Tensor, factors: torch.Tensor, norm_q: Any, norm_k: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised queries and keys [..., tokens, heads, head_dim], neighbouring features rotated.

    Args:
        query, key: [..., tokens, heads, head_dim].
        factors: cosines and sines [..., tokens, head_dim / 2, 2].
        norm_q, norm_k: RMS norms of one epsilon; without a weight they are identities.
    """
    cos, sin = factors.unbind(-1)
    weights = [weight_of(norm) for norm in (norm_q, norm_k)]
    if weights[0] is None:
        return qk_norm_rope(query, key, cos, sin, norm="none")
    return qk_norm_rope(query, key, cos, sin, query_weight=weights[0], key_weight=weights[1], eps=norm_q.eps)


def use_real_rotary(transformer: ZImageTransformer2DModel) -> None:
    """Make `forward_batch` compute rotary embeddings in real arithmetic, for `torch.compile`."""
    for module in transformer.modules():
        if isinstance(module, Attention):
            module.set_processor(RealRotaryProcessor())


def forward_batch(
    transformer: ZImageTransformer2DModel,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    caption: torch.Tensor,
    caption_lengths: torch.Tensor,
    probe: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The transformer's output for a batch.

    Args:
        transformer: the stock model, patch size 2.
        latents: [n, C, H, W]; (H / 2) * (W / 2) must be a multiple of 32.
        timestep: [n], 1 - sigma in [0, 1] as `ZImagePipeline` passes it.
        caption: [n, L, D] text features; rows beyond `caption_lengths` may hold anything.
        caption_lengths: [n], real tokens of each caption, 1 … L.
        probe: index of a main block whose image tokens are returned too.

    Returns:
        The estimate of data - noise [n, C, H, W]; the hidden image tokens [n, h w, dim] after block `probe`, or None.

    Raises:
        ValueError: the image is not a multiple of 32 tokens or has odd sides.
    """
    n, channels, height, width = latents.shape
    rows, columns = height // 2, width // 2
    if height % 2 or width % 2 or (rows * columns) % SEQUENCE_MULTIPLE:
        raise ValueError(f"latents of {height}x{width} are not a multiple of {SEQUENCE_MULTIPLE} patches of 2x2")
    modulation = transformer.t_embedder(timestep * transformer.t_scale).type_as(latents)

    image = transformer.all_x_embedder["2-1"](patchify(latents))

    padded = -(-caption.shape[1] // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE
    text = transformer.cap_embedder(torch.nn.functional.pad(caption, (0, 0, 0, padded - caption.shape[1])))
    is_pad = torch.arange(padded, device=text.device)[None, :] >= caption_lengths[:, None].to(text.device)
    text = torch.where(is_pad[..., None], transformer.cap_pad_token, text)

    image_freqs, text_freqs = _rope(transformer, rows, columns, padded, latents.device)
    for block in transformer.noise_refiner:
        image = block(image, None, image_freqs, modulation)
    for block in transformer.context_refiner:
        text = block(text, None, text_freqs)
    hidden = torch.cat([image, text], dim=1)
    freqs = torch.cat([image_freqs, text_freqs], dim=1)
    probed = None
    for index, block in enumerate(transformer.layers):
        hidden = block(hidden, None, freqs, modulation)
        if index == probe:
            probed = hidden[:, : rows * columns]
    # Only image tokens are read from the last layer.
    output = transformer.all_final_layer["2-1"](hidden[:, : rows * columns], c=modulation)
    output = output.reshape(n, rows, columns, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
    return output.reshape(n, channels, height, width), probed


def _rope(
    transformer: ZImageTransformer2DModel, rows: int, columns: int, caption_length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary factors [1, tokens, head_dim / 2]: captions run along the first axis, the image comes after them."""
    text_ids = torch.zeros(caption_length, 3, dtype=torch.long, device=device)
    text_ids[:, 0] = torch.arange(1, caption_length + 1, device=device)
    image_ids = torch.empty(rows, columns, 3, dtype=torch.long, device=device)
    image_ids[..., 0] = caption_length + 1
    image_ids[..., 1] = torch.arange(rows, device=device)[:, None]
    image_ids[..., 2] = torch.arange(columns, device=device)
    embed = transformer.rope_embedder
    image, text = embed(image_ids.flatten(0, 1))[None], embed(text_ids)[None]
    if isinstance(transformer.layers[0].attention.processor, RealRotaryProcessor):
        return torch.view_as_real(image), torch.view_as_real(text)
    return image, text
