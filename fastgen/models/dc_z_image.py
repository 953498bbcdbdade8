"""`DCZImageTransformer2DModel`: Z-Image's transformer with dynamic chunking (arXiv 2603.06351, section "upcycling").

The blocks are Z-Image's, with its parameter names, on one packed sequence per sample: the kept image tokens, then the
caption. Image tokens are latent positions (patch size 1) of which the router keeps about a quarter, as many as Z-Image
has patches of 2 x 2; their rotary positions are in units of such patches, so that copied weights see what they know.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_z_image import FeedForward, TimestepEmbedder
from torch import Tensor, nn

from fastgen.errors import FastgenError
from fastgen.kernels.varlen import varlen_attention
from fastgen.models.caching import cacheable
from fastgen.models.chunking import Chunks, TailDrop, TokenBudget
from fastgen.models.dc_dit import DCTransformerOutput
from fastgen.models.elastic import ElasticModelMixin
from fastgen.models.layers import rotary_factors
from fastgen.models.norms import ReadableRMSNorm, weight_of
from fastgen.models.packing import Segments, adaptive
from fastgen.models.patch_grid import Captions, PatchChunking, forward_patches
from fastgen.models.routers import RouterKind
from fastgen.models.scaffold import DynamicChunking, ResidualGate
from fastgen.models.z_image_batch import SEQUENCE_MULTIPLE, turn
from fastgen.pretrained import load_pretrained

Grid = Literal["latent", "patch"]
GRIDS: tuple[Grid, ...] = ("latent", "patch")
_CONDITIONING = 256  # most features of Z-Image's timestep embedding


class PackedRotaryAttention(nn.Module):
    """Self-attention with normalised queries and keys and rotary positions, over packed sequences."""

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.norm_q = ReadableRMSNorm(dim // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.norm_k = ReadableRMSNorm(dim // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])

    def forward(
        self, hidden_states: Tensor, rotary: Tensor, segments: Segments, wanted: Tensor | None = None
    ) -> Tensor:
        """hidden_states [T, D], rotary [T, head_dim / 2, 2] -> [T, D], or of the rows `wanted`, int64 [W], [W, D]."""
        query, key, value = (
            layer(hidden_states).unflatten(-1, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v)
        )
        query, key = turn(query, key, rotary, self.norm_q, self.norm_k)
        mixed = varlen_attention(query, key, value, segments.cu_seqlens, segments.max_seqlen)
        mixed = mixed.flatten(1)
        return self.to_out[0](mixed if wanted is None else mixed.index_select(0, wanted))


class LeanFeedForward(FeedForward):
    """Z-Image's feed-forward layer without a copy of its hidden features where no gradient is needed: at small widths
    fresh memory costs a CPU as much as the products do."""

    def _forward_silu_gating(self, x1: Tensor, x3: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.silu(x1) * x3
        return F.silu(x1, inplace=True).mul_(x3)


@cacheable
class DCZImageBlock(nn.Module):
    """Z-Image's block on packed sequences.

    Args:
        dim, heads: width and attention heads.
        norm_eps: of the RMS norms.
        qk_norm: normalise queries and keys.
        modulated: scale and gate by the timestep; the caption's refiner has none.
    """

    def __init__(self, dim: int, heads: int, norm_eps: float, qk_norm: bool, modulated: bool = True) -> None:
        super().__init__()
        self.attention = PackedRotaryAttention(dim, heads, qk_norm)
        self.feed_forward = LeanFeedForward(dim, int(dim / 3 * 8))
        self.attention_norm1 = ReadableRMSNorm(dim, eps=norm_eps)
        self.ffn_norm1 = ReadableRMSNorm(dim, eps=norm_eps)
        self.attention_norm2 = ReadableRMSNorm(dim, eps=norm_eps)
        self.ffn_norm2 = ReadableRMSNorm(dim, eps=norm_eps)
        self.modulated = modulated
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.Linear(min(dim, _CONDITIONING), 4 * dim))

    def forward(
        self,
        hidden_states: Tensor,
        rotary: Tensor,
        segments: Segments,
        conditioning: Tensor | None = None,
        wanted: tuple[Tensor, Segments] | None = None,
    ) -> Tensor:
        """hidden_states [T, D], conditioning [n, c] -> [T, D].

        `wanted` selects the rows to compute, int64 [W], and their division into sequences: -> [W, D].
        """
        if self.modulated and conditioning is not None:
            scale1, gate1, scale2, gate2 = self.adaLN_modulation(conditioning).chunk(4, dim=-1)
        else:
            scale1 = gate1 = scale2 = gate2 = None
        before, between = self.attention_norm1, self.ffn_norm1
        after = {"update_norm": True, "update_eps": before.eps, "tanh_gate": True}
        _, normed = adaptive(
            hidden_states, segments, scale=scale1, weight=weight_of(before), norm="rms", eps=before.eps
        )
        update = self.attention(normed, rotary, segments, None if wanted is None else wanted[0])
        if wanted is not None:
            hidden_states, segments = hidden_states.index_select(0, wanted[0]), wanted[1]
        hidden_states, normed = adaptive(
            hidden_states,
            segments,
            update=update,
            gate=gate1,
            scale=scale2,
            weight=weight_of(between),
            norm="rms",
            eps=between.eps,
            update_weight=weight_of(self.attention_norm2),
            **after,
        )
        hidden_states, _ = adaptive(
            hidden_states,
            segments,
            update=self.feed_forward(normed),
            gate=gate2,
            norm="none",
            update_weight=weight_of(self.ffn_norm2),
            **after,
        )
        return hidden_states


class DCZImageTransformer2DModel(ElasticModelMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Z-Image's transformer that computes only the image tokens its router keeps.

    It takes the place of `ZImageTransformer2DModel` in a stock `ZImagePipeline`. Loss contract: lossy (a model of its
    own, whose budget is set at call time).

    Args:
        in_channels: as all arguments up to `axes_dims`, those of `ZImageTransformer2DModel`.
        position_scale: rotary units of a latent position; one half, as Z-Image counts patches of 2. With grid "patch"
            a token is such a patch, and this is not used.
        scaffold_dim: as all arguments up to `smoothing`, those of `DynamicChunking`.
        compression: N, the target of the ratio loss.
        grid: "latent", tokens are latent positions, as in the paper; "patch", they are the patches of 2 x 2 of the
            model that it was upcycled from, see `fastgen.models.patch_grid`.
        floor: with grid "patch", the least share of a sample's tokens to keep.
        n_last_layers: with grid "patch", how many of the n_layers see all patches again.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DCZImageBlock", "ScaffoldBlock"]
    _repeated_blocks = ["DCZImageBlock"]
    _skip_layerwise_casting_patterns = ["t_embedder", "cap_embedder", "router"]
    _replaces = ("ZImageTransformer2DModel",)
    _inputs = ("x", "t")

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        dim: int = 3840,
        n_layers: int = 30,
        n_refiner_layers: int = 2,
        n_heads: int = 30,
        norm_eps: float = 1e-5,
        qk_norm: bool = True,
        cap_feat_dim: int = 2560,
        rope_theta: float = 256.0,
        t_scale: float = 1000.0,
        axes_dims: tuple[int, ...] = (32, 48, 48),
        position_scale: float = 0.5,
        scaffold_dim: int | None = None,
        scaffold_blocks: int = 2,
        router: RouterKind = "predictability",
        router_dim: int | None = None,
        center_tap: bool = False,
        residual_gate: ResidualGate = "confidence",
        smoothing: float | None = 1.0,
        compression: float = 4.0,
        grid: Grid = "latent",
        floor: float = 0.0,
        n_last_layers: int = 1,
    ) -> None:
        super().__init__()
        if grid not in GRIDS:
            raise ValueError(f"grid: {grid!r} is unknown; choose one of {', '.join(GRIDS)}")
        if not 0 <= floor <= 1 or (floor and grid == "latent"):
            raise ValueError(
                f"floor: needs a share in [0, 1], and grid 'patch' unless it is 0; got {floor} and {grid!r}"
            )
        if dim // n_heads != sum(axes_dims):
            raise ValueError(f"axes_dims: must add up to dim / n_heads = {dim // n_heads}, got {tuple(axes_dims)}")
        self.in_channels = in_channels
        self.gradient_checkpointing = False
        width = min(dim, _CONDITIONING)
        self.t_embedder = TimestepEmbedder(width, mid_size=1024)
        self.cap_embedder = nn.Sequential(ReadableRMSNorm(cap_feat_dim, eps=norm_eps), nn.Linear(cap_feat_dim, dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, dim))
        # Conditioning of encoder and decoder: timestep and pooled caption through trainable norms (section 10).
        self.time_adaptor = nn.LayerNorm(width)
        self.text_adaptor = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.scaffold: DynamicChunking | PatchChunking
        if grid == "patch":
            self.scaffold = PatchChunking.of_config(self.config, in_channels, dim, width)
        else:
            self.scaffold = DynamicChunking.of_config(self.config, in_channels, in_channels, dim, width)
        shape = (dim, n_heads, norm_eps, qk_norm)
        self.noise_refiner = nn.ModuleList(DCZImageBlock(*shape) for _ in range(n_refiner_layers))
        self.context_refiner = nn.ModuleList(DCZImageBlock(*shape, modulated=False) for _ in range(n_refiner_layers))
        if grid == "latent":
            n_last_layers = 0
        elif not 0 <= n_last_layers < n_layers:
            raise ValueError(f"n_last_layers: needs 0 to {n_layers - 1}, fewer than n_layers, got {n_last_layers}")
        self.layers = nn.ModuleList(DCZImageBlock(*shape) for _ in range(n_layers - n_last_layers))
        self.last_layers = nn.ModuleList(DCZImageBlock(*shape) for _ in range(n_last_layers))
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.adaLN_out = nn.Sequential(nn.SiLU(), nn.Linear(width, dim))

    def forward(
        self,
        x: list[Tensor] | Tensor,
        t: Tensor,
        cap_feats: list[Tensor],
        return_dict: bool = True,
        controlnet_block_samples: dict[int, Tensor] | None = None,
        siglip_feats: list[list[Tensor]] | None = None,
        image_noise_mask: list[list[int]] | None = None,
        patch_size: int = 2,
        f_patch_size: int = 1,
        joint_attention_kwargs: dict[str, Any] | None = None,
        tail_drop: TailDrop | None = None,
        token_budget: TokenBudget | None = None,
        output_chunks: bool = False,
    ) -> DCTransformerOutput | tuple[list[Tensor]]:
        """Predict the velocity.

        Args:
            x: latents of n images, each [C, 1, H, W], all of one size; any sides.
            t: [n], 1 - sigma.
            cap_feats: caption features, each [L_i, cap_feat_dim].
            return_dict: False gives `(samples,)`.
            controlnet_block_samples, siglip_feats, image_noise_mask: not supported.
            patch_size, f_patch_size, joint_attention_kwargs: accepted for the stock signature; tokens are latent
                positions here.
            tail_drop: share of the natural set to drop, one number in [0, 1) or one per sample.
            token_budget: exact number of image tokens to keep, of every sample or one per sample.
            output_chunks: also return which tokens were kept.

        Raises:
            ValueError: images of different sizes or of several frames, inputs that are not supported, or a knob out of
                range.
        """
        given = (controlnet_block_samples, siglip_feats, image_noise_mask)
        for name, value in zip(("controlnet_block_samples", "siglip_feats", "image_noise_mask"), given, strict=True):
            if value is not None:
                raise ValueError(f"{name}: is not supported by {type(self).__name__}")
        if len({image.shape for image in x}) != 1 or x[0].ndim != 4 or x[0].shape[1] != 1 or len(x) != len(cap_feats):
            shapes = [tuple(image.shape) for image in x]
            raise ValueError(
                f"x: needs images [C, 1, H, W] of one size, one per caption ({len(cap_feats)}); got {shapes}"
            )
        latents = torch.stack([image[:, 0] for image in x])
        tail_drop, token_budget = self.resolve_budget(tail_drop, token_budget, len(latents), self.sigma(t))
        time = self.t_embedder(t * self.config.t_scale).type_as(latents)
        text = self.read_captions(cap_feats)
        conditioning = self.time_adaptor(time) + self.text_adaptor(text.pooled)
        if self.config.grid == "patch":
            prediction, chunked, decoded = forward_patches(
                self, latents, time, text, conditioning, tail_drop, token_budget
            )
        else:
            chunked = self.chunk(latents, conditioning, tail_drop, token_budget)
            scaffold: Any = self.scaffold
            decoded = scaffold.unchunk(self.backbone(chunked.tokens, text, time, chunked.chunks), chunked)
            prediction = scaffold.decoder(decoded, chunked.chunks.grid, conditioning)
        sample = list(prediction[:, :, None].unbind(0))
        if not return_dict:
            return (sample,)
        if not output_chunks:
            return DCTransformerOutput(sample=sample)
        return DCTransformerOutput(sample, chunked.chunks, encoded=chunked.features, decoded=decoded)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any) -> Any:
        """As in diffusers; code that comes with a model is refused.

        Raises:
            FastgenError: `grid` is not the checkpoint's own, whose weights fit no other.
        """
        asked = kwargs.pop("grid", None)
        loaded = load_pretrained(super(), pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if asked not in (None, model.config.grid):
            raise FastgenError(
                f"grid: {asked!r} is not allowed, {pretrained_model_name_or_path} has {model.config.grid!r}"
            )
        return loaded

    def sigma(self, time: Tensor) -> Tensor:
        return 1 - time

    def read_captions(self, cap_feats: list[Tensor]) -> Captions:
        """Embedded and refined captions, which depend on no step: read once a generation, whose steps bring the very
        same tensors. Training reads them every time."""
        running = None if torch.compiler.is_compiling() or torch.is_grad_enabled() else self._generation()
        if running is None or any(features.is_inference() for features in cap_feats):  # these have no version
            return self._read(cap_feats)
        seen = tuple((features, features._version) for features in cap_feats)
        if not isinstance(running.captions, Captions) or not running.captions.of(seen):
            running.captions = replace(self._read(cap_feats), source=seen)
        return running.captions

    def _read(self, cap_feats: list[Tensor]) -> Captions:
        embedded = [self.cap_embedder(features) for features in cap_feats]
        pads = [-len(features) % SEQUENCE_MULTIPLE for features in cap_feats]
        padded = [
            torch.cat([tokens, self.cap_pad_token.to(tokens.dtype).expand(pad, -1)])
            for tokens, pad in zip(embedded, pads, strict=True)
        ]
        pooled = torch.stack([tokens.mean(dim=0) for tokens in embedded])
        text, lengths = torch.cat(padded), [len(tokens) for tokens in padded]
        segments = Segments.of(lengths, text.device)
        starts = segments.cu_seqlens.index_select(0, segments.sequence_ids)
        places = torch.zeros(len(text), 3, device=text.device, dtype=torch.float64)
        places[:, 0] = torch.arange(len(text), device=text.device) - starts + 1
        rotary = rotary_factors(places, list(self.config.axes_dims), self.config.rope_theta)
        for block in self.context_refiner:
            text = self._run(block, text, rotary, segments)
        return Captions(text, rotary, segments, lengths, pooled)

    def backbone(self, image: Tensor, text: Captions, time: Tensor, chunks: Chunks) -> Tensor:
        """Z-Image's transformer on packed image tokens [T, D] and caption tokens; returns the image tokens."""
        device = image.device
        rope = (list(self.config.axes_dims), self.config.rope_theta)
        index, width = chunks.positions % chunks.grid_size, chunks.grid[1]
        after = (text.segments.cu_seqlens.diff() + 1).index_select(0, chunks.segments.sequence_ids)
        grid_places = [(place + 0.5) * self.config.position_scale - 0.5 for place in (index // width, index % width)]
        image_rotary = rotary_factors(torch.stack([after.double(), *grid_places], dim=1), *rope)

        for block in self.noise_refiner:
            image = self._run(block, image, image_rotary, chunks.segments, time)

        # One sequence per sample: its image tokens, then its caption.
        segments = Segments.of([a + b for a, b in zip(chunks.lengths, text.lengths, strict=True)], device)
        ids = torch.cat([chunks.segments.sequence_ids, text.segments.sequence_ids])
        order = ids.argsort(stable=True)
        hidden = torch.cat([image, text.tokens]).index_select(0, order)
        rotary = torch.cat([image_rotary, text.rotary]).index_select(0, order)
        for block in self.layers:
            hidden = self._run(block, hidden, rotary, segments, time)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        hidden = hidden.index_select(0, places[: len(image)])
        _, normed = adaptive(hidden, chunks.segments, scale=self.adaLN_out(time), eps=self.norm_out.eps)
        return normed

    def _run(self, block: nn.Module, *arguments: Any) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)
