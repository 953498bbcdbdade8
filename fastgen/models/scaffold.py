"""The scaffold around a backbone in DC-DiT (arXiv 2603.06351): convolutional encoder and decoder at a narrow width."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_bool, check_integer, check_number
from fastgen.kernels.dechunk import dechunk
from fastgen.kernels.dispatch import active
from fastgen.kernels.pack import pack
from fastgen.models.chunking import (
    THRESHOLD,
    Chunks,
    TailDrop,
    TokenBudget,
    confidence,
    select_chunks,
    straight_through,
)
from fastgen.models.norms import GroupNormSiLU
from fastgen.models.routers import RouterKind, build_router

ResidualGate = Literal["confidence", "mask"]
RESIDUAL_GATES: tuple[ResidualGate, ...] = ("confidence", "mask")


def norm_groups(channels: int) -> int:
    """The largest number of groups, at most 32, that divides `channels` and has two channels in each."""
    return next(groups for groups in range(min(32, max(1, channels // 2)), 0, -1) if channels % groups == 0)


class ScaffoldBlock(nn.Module):
    """Residual block of latent diffusion models: two 3x3 convolutions, the conditioning vector added between.

    Args:
        width: channels d.
        conditioning: width of the conditioning vector.
    """

    def __init__(self, width: int, conditioning: int) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(norm_groups(width), width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conditioning = nn.Linear(conditioning, width)
        self.norm2 = GroupNormSiLU(norm_groups(width), width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, hidden: Tensor, conditioning: Tensor) -> Tensor:
        """hidden [n, d, H, W], conditioning [n, c] -> [n, d, H, W]."""
        residual = self.conv1(self.norm1(hidden))
        residual = residual + self.conditioning(F.silu(conditioning))[:, :, None, None]
        return hidden + self.conv2(self.norm2(residual))


class ScaffoldEncoder(nn.Module):
    """Latents to tokens of the backbone's width: 1x1 embedding, residual blocks at width d, a linear map to D.

    Args:
        channels: of the latents.
        width: d.
        dim: D.
        conditioning: width of the conditioning vector.
        blocks: residual blocks.
    """

    def __init__(self, channels: int, width: int, dim: int, conditioning: int, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, 1)
        self.blocks = nn.ModuleList(ScaffoldBlock(width, conditioning) for _ in range(blocks))
        self.proj = nn.Linear(width, dim)

    def forward(self, latents: Tensor, conditioning: Tensor) -> Tensor:
        """latents [n, C, H, W] -> tokens [n, H W, D]."""
        hidden = self.embed(latents)
        if active(latents):
            # Convolutions then keep the channels of a pixel side by side, as the kernels and `proj` need them.
            hidden = hidden.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            hidden = block(hidden, conditioning)
        return self.proj(hidden.flatten(2).transpose(1, 2))


class ScaffoldDecoder(nn.Module):
    """Tokens of the backbone's width to a prediction: linear map to d, residual blocks, norm and convolution.

    Args:
        channels: of the prediction.
        width: d.
        dim: D.
        conditioning: width of the conditioning vector.
        blocks: residual blocks.
    """

    def __init__(self, channels: int, width: int, dim: int, conditioning: int, blocks: int = 2) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(ScaffoldBlock(width, conditioning) for _ in range(blocks))
        self.norm = GroupNormSiLU(norm_groups(width), width)
        self.head = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, grid: tuple[int, int], conditioning: Tensor) -> Tensor:
        """tokens [n, H W, D] -> [n, C, H, W]."""
        hidden = self.proj(tokens).transpose(1, 2).unflatten(2, grid)
        for block in self.blocks:
            hidden = block(hidden, conditioning)
        return self.head(self.norm(hidden))


@dataclass(frozen=True, slots=True)
class Chunked:
    """What the scaffold hands to the backbone, and needs back for the decoder.

    Attributes:
        tokens: [T, D], kept tokens, packed.
        chunks: which they are.
        features: X [n, L, D], the encoder's output at every position.
    """

    tokens: Tensor
    chunks: Chunks
    features: Tensor


class DynamicChunking(nn.Module):
    """Encoder, router and decoder around a backbone (sections 1 to 6).

    Args:
        in_channels, out_channels: of the latents and of the prediction.
        dim: width D of the backbone.
        conditioning: width of the conditioning vector.
        width: d; None takes D / 4.
        blocks: residual blocks of encoder and of decoder.
        router: "predictability" or "cosine" (v1 of the paper).
        router_dim: its bottleneck; None takes D / 3 in multiples of 32, which meets the paper's parameter counts.
        center_tap: see `PredictabilityRouter`.
        residual_gate: how the router's decision meets the gradient. The paper leaves it open. "confidence" (H-Net):
            y = ste(c) dechunk(h) + W X with c = p where kept, 1 - p where dropped; "mask": the residual times ste(m).
        smoothing: sigma of the smoothing Gaussian in grid units, or None.

    Raises:
        ValueError: unknown router or gate, or sizes out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dim: int,
        conditioning: int,
        width: int | None = None,
        blocks: int = 2,
        router: RouterKind = "predictability",
        router_dim: int | None = None,
        center_tap: bool = False,
        residual_gate: ResidualGate = "confidence",
        smoothing: float | None = 1.0,
    ) -> None:
        super().__init__()
        if residual_gate not in RESIDUAL_GATES:
            raise ValueError(f"residual_gate: {residual_gate!r} is unknown; choose one of {', '.join(RESIDUAL_GATES)}")
        width = dim // 4 if width is None else check_integer("scaffold_dim", width, 1)
        blocks = check_integer("scaffold_blocks", blocks, 0)
        if router_dim is None:
            router_dim = max(1, round(dim / 96)) * 32
        check_integer("router_dim", router_dim, 1)
        check_bool("center_tap", center_tap)
        if smoothing is not None:
            check_number("smoothing", smoothing, above=0)
        self.residual_gate = residual_gate
        self.smoothing = smoothing
        self.encoder = ScaffoldEncoder(in_channels, width, dim, conditioning, blocks)
        self.router = build_router(router, dim, router_dim, center_tap)
        self.residual = nn.Linear(dim, dim, bias=False)
        self.decoder = ScaffoldDecoder(out_channels, width, dim, conditioning, blocks)
        nn.init.zeros_(self.residual.weight)

    @classmethod
    def of_config(
        cls, config: Any, in_channels: int, out_channels: int, dim: int, conditioning: int
    ) -> DynamicChunking:
        """The scaffold that the configuration of a model with dynamic chunking describes.

        Raises:
            ValueError: a value out of range.
        """
        check_number("compression", config.compression, above=1)
        check_number("position_scale", config.position_scale, above=0)
        return cls(
            in_channels,
            out_channels,
            dim,
            conditioning,
            width=config.scaffold_dim,
            blocks=config.scaffold_blocks,
            router=config.router,
            router_dim=config.router_dim,
            center_tap=config.center_tap,
            residual_gate=config.residual_gate,
            smoothing=config.smoothing,
        )

    def grid_of(self, latents: Tensor) -> tuple[int, int]:
        """The grid of latents [n, C, H, W]: their positions."""
        return latents.shape[2], latents.shape[3]

    def chunk(
        self,
        latents: Tensor,
        conditioning: Tensor,
        tail_drop: TailDrop | None,
        token_budget: TokenBudget | None,
        held: Chunks | None = None,
    ) -> Chunked:
        """Latents [n, C, H, W] to packed kept tokens; those of `held` when given.

        Raises:
            ValueError: see `fastgen.models.chunking.check_budget`.
        """
        grid = (latents.shape[2], latents.shape[3])
        features = self.encoder(latents, conditioning)
        probabilities = torch.sigmoid(self.router(features, grid))
        if held is None:
            chunks = select_chunks(probabilities, grid, tail_drop, token_budget)
        else:
            chunks = replace(held, probabilities=probabilities, natural=probabilities > THRESHOLD)
        return Chunked(pack(features, chunks.packing), chunks, features)

    def unchunk(self, hidden: Tensor, chunked: Chunked) -> Tensor:
        """The backbone's output [T, D] to one vector for every position, [n, L, D], plus the residual."""
        chunks = chunked.chunks
        where = (chunks.positions, chunks.probabilities, chunks.mask, chunks.grid)
        spread = dechunk(hidden, *where, self.smoothing, chunks.rows)
        residual = self.residual(chunked.features)
        if self.residual_gate == "confidence":
            spread = spread * straight_through(confidence(chunks))[..., None].to(spread.dtype)
        else:
            p = chunks.probabilities
            gate = p + (chunks.mask.to(p.dtype) - p).detach()
            residual = residual * gate[..., None].to(residual.dtype)
        return spread + residual
