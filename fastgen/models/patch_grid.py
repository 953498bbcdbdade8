"""Dynamic chunking on the backbone's own patch grid: nothing that a trained model knows has to be learned again.

On the paper's grid every latent position is a token, so a trained model's patch embedding and head are of no use, its
blocks meet tokens they do not know, and a scaffold of convolutions has to learn what the ends of the model did. Here
the tokens are the trained model's own patches, and its own first and last blocks are the scaffold:

1. Patch embedding and noise refiner see all patches; the router reads their output z.
2. The layers between see the kept ones alone, with the caption.
3. They write an update h - z of the residual stream. A dropped patch takes that of its nearest kept patch, as
   `dechunk` gives it, on top of its own z, which holds the patch's noise.
4. The last layers and the head see all patches again.

With all patches kept it computes exactly what the model it was upcycled from computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgen.kernels.dechunk import dechunk
from fastgen.kernels.pack import pack, scatter
from fastgen.models.chunking import (
    THRESHOLD,
    Chunks,
    TailDrop,
    TokenBudget,
    confidence,
    select_chunks,
    straight_through,
)
from fastgen.models.layers import rotary_factors
from fastgen.models.packing import Segments, adaptive
from fastgen.models.routers import PredictabilityRouter
from fastgen.models.scaffold import Chunked
from fastgen.models.z_image_batch import patchify

if TYPE_CHECKING:
    from fastgen.models.dc_z_image import DCZImageTransformer2DModel

__all__ = ["PATCH", "Captions", "PatchChunking", "forward_patches", "unpatchify"]

PATCH = 2
"""Latent positions a side of a patch."""
_KEEP_ALL = 1.5
"""First logit of every patch: all are kept at every noise level, and training can still change it soon."""


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches [n, h w, 4 C] to latents [n, C, 2 h, 2 w]: undoes `patchify`."""
    n, _, width = patches.shape
    blocks = patches.view(n, *grid, PATCH, PATCH, width // PATCH**2).permute(0, 5, 1, 3, 2, 4)
    return blocks.reshape(n, -1, grid[0] * PATCH, grid[1] * PATCH)


class PatchChunking(nn.Module):
    """Router and de-chunking on the patch grid, with the trained model's patch embedding and head; takes the place of
    `DynamicChunking`.

    Args:
        channels: C of the latents.
        dim: width D of the backbone.
        conditioning: width of the conditioning vector.
        router_dim: the router's bottleneck; None takes 32.
        center_tap: see `PredictabilityRouter`.
        smoothing: sigma of the smoothing Gaussian in patches, or None.
        floor: least share of a sample's patches to keep, in [0, 1].
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        conditioning: int,
        router_dim: int | None = None,
        center_tap: bool = False,
        smoothing: float | None = 1.0,
        floor: float = 0.0,
    ) -> None:
        super().__init__()
        self.smoothing, self.floor = smoothing, floor
        # The trained model's own.
        self.embed = nn.Linear(PATCH**2 * channels, dim)
        self.head = nn.Linear(dim, PATCH**2 * channels)
        # New: which patches to keep, and how much of its neighbour's update a dropped one takes.
        self.router = PredictabilityRouter(dim, router_dim or 32, center_tap)
        self.router_shift = nn.Linear(conditioning, dim)
        self.share = nn.Linear(conditioning, dim)
        nn.init.zeros_(self.share.weight)
        nn.init.ones_(self.share.bias)
        with torch.no_grad():
            self.router.head.weight.mul_(0.1)  # an order to drop them in, and no more
        nn.init.constant_(self.router.head.bias, _KEEP_ALL)  # type: ignore[arg-type]

    @classmethod
    def of_config(cls, config: Any, channels: int, dim: int, conditioning: int) -> PatchChunking:
        """The one that a model's configuration describes.

        Raises:
            ValueError: it asks for what the patch grid does not have.
        """
        if config.router != "predictability" or config.residual_gate != "confidence":
            raise ValueError(
                "grid: 'patch' needs router 'predictability' and residual_gate 'confidence', "
                f"got {config.router!r} and {config.residual_gate!r}"
            )
        given = {name: config[name] for name in ("router_dim", "center_tap", "smoothing", "floor")}
        return cls(channels, dim, conditioning, **given)

    def grid_of(self, latents: Tensor) -> tuple[int, int]:
        """Patches of latents [n, C, H, W], (H / 2, W / 2).

        Raises:
            ValueError: a side is no multiple of 2.
        """
        height, width = latents.shape[-2:]
        if height % PATCH or width % PATCH:
            raise ValueError(f"x: latents of {height}x{width} do not divide into patches of {PATCH}x{PATCH}")
        return height // PATCH, width // PATCH

    def chunk(
        self,
        latents: Tensor,
        conditioning: Tensor,
        tail_drop: TailDrop | None,
        token_budget: TokenBudget | None,
        held: Chunks | None = None,
        features: Tensor | None = None,
    ) -> Chunked:
        """Refined patches `features` [n, L, D] of latents [n, C, H, W] to packed kept ones, those of `held` if given.

        Raises:
            ValueError: see `fastgen.models.chunking.select_chunks`; sides that do not divide.
        """
        grid = self.grid_of(latents)
        if features is None:
            raise ValueError("features: needs the refined patches")
        probabilities = torch.sigmoid(self.router(features + self.router_shift(conditioning)[:, None], grid))
        if held is None:
            chunks = select_chunks(probabilities, grid, tail_drop, token_budget, self.floor)
        else:
            chunks = replace(held, probabilities=probabilities, natural=probabilities > THRESHOLD)
        return Chunked(pack(features, chunks.packing), chunks, features)

    def unchunk(self, hidden: Tensor, chunked: Chunked, conditioning: Tensor) -> Tensor:
        """What the layers made of the kept patches, [T, D], to all of them, [n, L, D]."""
        chunks = chunked.chunks
        whole = scatter(hidden, chunks.packing)
        if sum(chunks.lengths) < chunks.samples * chunks.grid_size:
            where = (chunks.positions, chunks.probabilities, chunks.mask, chunks.grid)
            update = dechunk(hidden - chunked.tokens, *where, self.smoothing, chunks.rows)
            guess = chunked.features + self.share(conditioning)[:, None] * update
            whole = torch.where(chunks.mask[..., None], whole, guess)
        if torch.is_grad_enabled():  # times one, with a gradient for the router
            one = straight_through(confidence(chunks))[..., None].to(whole.dtype)
            whole = chunked.features + one * (whole - chunked.features)
        return whole


def forward_patches(
    model: DCZImageTransformer2DModel,
    latents: Tensor,
    time: Tensor,
    text: Captions,
    conditioning: Tensor,
    tail_drop: TailDrop | None,
    token_budget: TokenBudget | None,
) -> tuple[Tensor, Chunked, Tensor]:
    """Velocity [n, C, H, W], what was kept, and what the head reads, [n, L, D].

    Args:
        model: with grid "patch".
        latents: [n, C, H, W].
        time: timestep embedding [n, c].
        text: refined captions.
        conditioning: [n, c].
        tail_drop, token_budget: see `select_chunks`.
    """
    scaffold: Any = model.scaffold
    grid, device, n = scaffold.grid_of(latents), latents.device, len(latents)
    length = grid[0] * grid[1]
    every = Segments.of([length] * n, device)
    image_rotary = text.of_image(grid, list(model.config.axes_dims), model.config.rope_theta)

    # What knows neither caption nor budget is computed once for both branches.
    distinct = _distinct(latents, time)
    own = every if distinct == n else Segments.of([length] * distinct, device)
    image = scaffold.embed(patchify(latents[:distinct])).flatten(0, 1)
    for block in model.noise_refiner:
        image = model._run(block, image, image_rotary[: len(image)], own, time[:distinct])
    features = image.view(distinct, length, -1).repeat(n // distinct, 1, 1)

    chunked = model.chunk(latents, conditioning, tail_drop, token_budget, features=features)
    chunks = chunked.chunks
    kept = _Part(chunked.tokens, image_rotary.index_select(0, chunks.positions), chunks.segments, chunks.lengths)
    words = _Part(text.tokens, text.rotary, text.segments, text.lengths)
    hidden, tokens = _run_joined(model, model.layers, kept, words, time)
    image = scaffold.unchunk(hidden, chunked, conditioning).flatten(0, 1)
    whole = _Part(image, image_rotary, every, [length] * n)
    image, _ = _run_joined(model, model.last_layers, whole, replace(words, tokens=tokens), time, image_only=True)
    _, normed = adaptive(image, every, scale=model.adaLN_out(time), eps=model.norm_out.eps)
    normed = normed.view(n, length, -1)
    return unpatchify(scaffold.head(normed), grid), chunked, normed


def _distinct(latents: Tensor, time: Tensor) -> int:
    """How many of the first samples hold all that there is: half of them, where the second half repeats the first, as
    with guidance. Looked for where looking is cheap, and not in training."""
    n = len(latents)
    if n % 2 or latents.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return n
    return n // 2 if all(torch.equal(*each.chunk(2)) for each in (time, latents)) else n


@dataclass(frozen=True, slots=True)
class Captions:
    """What a transformer has read: refined caption tokens, packed, with Z-Image's padding.

    Attributes:
        tokens: [T, D].
        rotary: their factors.
        segments, lengths: how they divide into samples.
        pooled: mean real token of each sample before refining [n, D].
        source: the features that were read, and their versions.
        images: rotary factors of all patches behind these captions, by grid.
    """

    tokens: Tensor
    rotary: Tensor
    segments: Segments
    lengths: list[int]
    pooled: Tensor
    source: tuple[tuple[Tensor, int], ...] = ()
    images: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def of(self, source: tuple[tuple[Tensor, int], ...]) -> bool:
        """Whether these very features were read, and have not been written to since."""
        pairs = zip(source, self.source, strict=False)
        return len(source) == len(self.source) and all(a is b and v == w for (a, v), (b, w) in pairs)

    def of_image(self, grid: tuple[int, int], axes_dims: list[int], theta: float) -> Tensor:
        """Rotary factors of all patches of a grid."""
        if grid not in self.images:
            self.images[grid] = rotary_factors(_image_places(grid, self.segments), axes_dims, theta)
        return self.images[grid]


@dataclass(frozen=True, slots=True)
class _Part:
    """Packed tokens of one kind, their rotary factors, and how they divide into samples."""

    tokens: Tensor
    rotary: Tensor
    segments: Segments
    lengths: Sequence[int]


def _run_joined(
    model: DCZImageTransformer2DModel,
    blocks: nn.ModuleList,
    image: _Part,
    text: _Part,
    time: Tensor,
    image_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Blocks on one sequence per sample, its image tokens and then its caption; returns both packed again.

    With `image_only` the last block does not compute the caption's tokens, and those that come back are none.
    """
    if not len(blocks):
        return image.tokens, text.tokens
    order = torch.cat([image.segments.sequence_ids, text.segments.sequence_ids]).argsort(stable=True)
    hidden = torch.cat([image.tokens, text.tokens]).index_select(0, order)
    rotary = torch.cat([image.rotary, text.rotary]).index_select(0, order)
    segments = Segments.of([a + b for a, b in zip(image.lengths, text.lengths, strict=True)], hidden.device)
    count = len(image.tokens)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    for block in blocks[:-1] if image_only else blocks:
        hidden = model._run(block, hidden, rotary, segments, time)
    if image_only:
        wanted = (places[:count], image.segments)
        return model._run(blocks[-1], hidden, rotary, segments, time, wanted), text.tokens[:0]
    packed = hidden.index_select(0, places)
    return packed[:count], packed[count:]


def _image_places(grid: tuple[int, int], captions: Segments) -> Tensor:
    """Rotary places [n h w, 3] of all patches: behind the caption, then row and column."""
    after = captions.cu_seqlens.diff().double() + 1
    index = torch.arange(grid[0] * grid[1], device=after.device)
    own = torch.stack([index // grid[1], index % grid[1]], dim=1).double()
    first = after[:, None, None].expand(-1, len(index), 1)
    return torch.cat([first, own.expand(len(after), -1, -1)], dim=-1).flatten(0, 1)
