"""`DCDiTTransformer2DModel`: a class-conditional DiT with dynamic chunking (arXiv 2603.06351)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from fastgen.kernels.varlen import varlen_attention
from fastgen.models.caching import cacheable
from fastgen.models.chunking import Chunks, TailDrop, TokenBudget
from fastgen.models.elastic import ElasticModelMixin
from fastgen.models.packing import Segments, adaptive
from fastgen.models.routers import RouterKind
from fastgen.models.scaffold import DynamicChunking, ResidualGate

#: layers, width, heads (section 8).
PRESETS: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


@dataclass
class DCTransformerOutput(BaseOutput):
    """Output of a transformer with dynamic chunking.

    Args:
        sample: prediction [n, C, H, W] (for Z-Image: a list of [C, F, H, W]).
        chunks: which tokens were kept, when requested.
        encoded: with the chunks, the encoder's output X [n, L, D].
        decoded: with the chunks, what the decoder reads [n, L, D].
    """

    sample: Any
    chunks: Chunks | None = None
    encoded: Tensor | None = None
    decoded: Tensor | None = None


def sincos_positions(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """2-D sine-cosine embedding [T, dim] of grid coordinates [T], in DiT's layout: columns first, sines first."""
    if dim % 4:
        raise ValueError(f"dim: needs a multiple of 4, got {dim}")
    frequencies = 10000 ** -(torch.arange(dim // 4, device=rows.device, dtype=torch.float64) / (dim // 4))
    angles = [place.double()[:, None] * frequencies for place in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


class PackedSelfAttention(nn.Module):
    """Self-attention over packed sequences, with the parameter names of diffusers' `Attention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, hidden_states: Tensor, segments: Segments) -> Tensor:
        """[T, D] -> [T, D]."""
        query, key, value = (
            layer(hidden_states).unflatten(-1, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v)
        )
        mixed = varlen_attention(query, key, value, segments.cu_seqlens, segments.max_seqlen)
        return self.to_out[0](mixed.flatten(1))


@cacheable
class DCDiTBlock(nn.Module):
    """DiT's block (adaLN-Zero) on packed sequences; conditioning is looked up by sequence.

    Args:
        dim: width D.
        heads: attention heads.
        norm_eps: of the norm before the feed-forward network.
    """

    def __init__(self, dim: int, heads: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.modulation = nn.Linear(dim, 6 * dim)
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn1 = PackedSelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=norm_eps)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate")
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, hidden_states: Tensor, conditioning: Tensor, segments: Segments) -> Tensor:
        """hidden_states [T, D], conditioning [n, D] after SiLU -> [T, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(conditioning).chunk(6, dim=-1)
        _, normed = adaptive(hidden_states, segments, scale=scale1, shift=shift1, eps=self.norm1.eps)
        attended = self.attn1(normed, segments)
        hidden_states, normed = adaptive(
            hidden_states,
            segments,
            update=attended,
            gate=gate1,
            scale=scale2,
            shift=shift2,
            eps=self.norm2.eps,
        )
        hidden_states, _ = adaptive(hidden_states, segments, update=self.ff(normed), gate=gate2, norm="none")
        return hidden_states


class DCDiTTransformer2DModel(ElasticModelMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Class-conditional diffusion transformer that computes only the tokens its router keeps.

    It takes the place of `DiTTransformer2DModel` in a stock `DiTPipeline`. Loss contract: lossy (a model of its own,
    whose budget is set at call time).

    Args:
        sample_size: side of the latents the model was trained on.
        in_channels: of the latents.
        out_channels: of the prediction; twice in_channels when sigma is learned.
        num_layers, num_attention_heads, attention_head_dim: of the backbone; D = heads * head_dim.
        scaffold_dim: d; None is D / 4.
        scaffold_blocks: residual blocks of encoder and of decoder.
        num_classes: classes; label `num_classes` is the unconditional one.
        class_dropout_prob: share of labels replaced by it in training.
        norm_eps: see `DCDiTBlock`.
        position_scale: grid units of a latent position; 0.5 for weights of a DiT with patches of 2.
        router, router_dim, center_tap, residual_gate, smoothing: see `DynamicChunking`.
        compression: N, the target of the ratio loss.
    """

    scaffold: DynamicChunking
    _supports_gradient_checkpointing = True
    _no_split_modules = ["DCDiTBlock", "ScaffoldBlock"]
    _repeated_blocks = ["DCDiTBlock"]
    _skip_layerwise_casting_patterns = ["embedder", "norm", "router"]
    _replaces = ("DiTTransformer2DModel",)
    _inputs = ("hidden_states", "timestep")

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        scaffold_dim: int | None = None,
        scaffold_blocks: int = 2,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        norm_eps: float = 1e-6,
        position_scale: float = 1.0,
        router: RouterKind = "predictability",
        router_dim: int | None = None,
        center_tap: bool = False,
        residual_gate: ResidualGate = "confidence",
        smoothing: float | None = 1.0,
        compression: float = 4.0,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.inner_dim = dim
        self.gradient_checkpointing = False
        self.embedder = CombinedTimestepLabelEmbeddings(num_classes, dim, class_dropout_prob)
        self.scaffold = DynamicChunking.of_config(self.config, in_channels, out_channels, dim, dim)
        self.transformer_blocks = nn.ModuleList(
            DCDiTBlock(dim, num_attention_heads, norm_eps) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(dim, 2 * dim)

    @classmethod
    def from_preset(cls, size: str, image_size: int = 256, **config: Any) -> DCDiTTransformer2DModel:
        """A model of the paper's ImageNet sizes with fresh weights (section 8).

        Args:
            size: "S", "B", "L" or "XL".
            image_size: 256 or 512 pixels; latents have an eighth of it.
            config: overrides of the model's configuration.

        Raises:
            ValueError: unknown size, or an image size that is no positive multiple of 8.
        """
        if size not in PRESETS:
            raise ValueError(f"size: {size!r} is unknown; choose one of {', '.join(PRESETS)}")
        if image_size < 8 or image_size % 8:
            raise ValueError(f"image_size: needs a positive multiple of 8, got {image_size}")
        layers, dim, heads = PRESETS[size]
        shape = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": dim // heads}
        return cls(**{"sample_size": image_size // 8, **shape, **config})

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        tail_drop: TailDrop | None = None,
        token_budget: TokenBudget | None = None,
        output_chunks: bool = False,
        return_dict: bool = True,
    ) -> DCTransformerOutput | tuple[Tensor]:
        """Predict noise (and sigma).

        Args:
            hidden_states: latents [n, C, H, W], any sides.
            timestep: [n].
            class_labels: [n].
            tail_drop: share of the natural set to drop, one number in [0, 1) or one per sample.
            token_budget: exact number of tokens to keep, of every sample or one per sample.
            output_chunks: also return which tokens were kept.
            return_dict: False gives `(sample,)`.

        Raises:
            ValueError: a knob out of range, see `fastgen.models.chunking.check_budget`.
        """
        sigma = self.sigma(timestep)
        tail_drop, token_budget = self.resolve_budget(tail_drop, token_budget, len(hidden_states), sigma)
        conditioning = self.embedder(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        chunked = self.chunk(hidden_states, conditioning, tail_drop, token_budget)
        chunks = chunked.chunks
        hidden = self.backbone(chunked.tokens, conditioning, chunks)
        decoded = self.scaffold.unchunk(hidden, chunked)
        sample = self.scaffold.decoder(decoded, chunks.grid, conditioning)
        if not return_dict:
            return (sample,)
        if not output_chunks:
            return DCTransformerOutput(sample=sample)
        return DCTransformerOutput(sample=sample, chunks=chunks, encoded=chunked.features, decoded=decoded)

    def sigma(self, time: Tensor) -> Tensor:
        return time / 1000

    def backbone(self, tokens: Tensor, conditioning: Tensor, chunks: Chunks) -> Tensor:
        """The DiT on packed tokens [T, D]."""
        index = chunks.positions % chunks.grid_size
        rows, columns = (
            (place + 0.5) * self.config.position_scale - 0.5
            for place in (index // chunks.grid[1], index % chunks.grid[1])
        )
        hidden = tokens + sincos_positions(rows, columns, self.inner_dim).to(tokens.dtype)
        active = F.silu(conditioning)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden = self._gradient_checkpointing_func(block, hidden, active, chunks.segments)
            else:
                hidden = block(hidden, active, chunks.segments)
        shift, scale = self.proj_out_1(active).chunk(2, dim=-1)
        _, normed = adaptive(hidden, chunks.segments, scale=scale, shift=shift, eps=self.norm_out.eps)
        return normed
