"""Dynamic chunking on the backbone's own patch grid: nothing that a trained model knows has to be learned again.

On the paper's grid every latent position is a token, so a trained model's patch embedding and head are of no use and
its blocks meet tokens they do not know. Here the tokens are the trained model's own patches. Its embedding and head
stay, and with all patches kept the model computes exactly what it was upcycled from. A dropped patch is filled in:

1. Kept patches give data, x_0 = x_t + sigma v, not velocities: the velocity holds the noise of its own patch, which no
   neighbour has, whereas data are smooth.
2. Of those a dropped patch takes what `dechunk` gives it, and its own noisy latents, each weighted by its precision:
   between two Gaussians around x_0, of variance s^2 and (sigma / (1 - sigma))^2, the mean of the product is the best
   guess. s^2 is learned for each feature of a patch.
3. A small convolutional decoder corrects the guess. It begins as zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.kernels.dechunk import dechunk
from fastgen.kernels.pack import pack, scatter
from fastgen.models.chunking import THRESHOLD, Chunks, TailDrop, confidence, select_chunks, straight_through
from fastgen.models.routers import PredictabilityRouter
from fastgen.models.scaffold import Chunked, ScaffoldDecoder, ScaffoldEncoder
from fastgen.models.z_image_batch import patchify

__all__ = ["PATCH", "PatchChunking", "fill_in", "unpatchify"]

PATCH = 2
"""Latent positions a side of a patch."""
_KEEP_ALL = 1.5
"""First logit of every patch: all are kept, whatever the noise, and training can still change it soon."""
_FIRST_VARIANCE = 0.3


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches [n, h w, 4 C] to latents [n, C, 2 h, 2 w]: undoes `patchify`."""
    n, _, width = patches.shape
    blocks = patches.view(n, *grid, PATCH, PATCH, width // PATCH**2).permute(0, 5, 1, 3, 2, 4)
    return blocks.reshape(n, -1, grid[0] * PATCH, grid[1] * PATCH)


def fill_in(noisy: Tensor, spread: Tensor, sigma: Tensor, variance: Tensor) -> Tensor:
    """Velocity of dropped patches: (x_0 - x_t) / sigma, x_0 the mean of what the neighbours say of it and what the
    patch itself shows, weighted by precision.

    Args:
        noisy: x_t, [n, L, F].
        spread: x_0 of the neighbours, [n, L, F], taken to be off by `variance`.
        sigma: noise levels in [0, 1], [n].
        variance: [F], positive.

    Returns:
        [n, L, F]; finite at every level, spread - x_t at sigma 1.
    """
    level = sigma.to(noisy.dtype)[:, None, None]
    precision = variance * (1 - level).square() + level.square()
    return ((variance * (1 - level) - level) * noisy + level * spread) / precision


class PatchChunking(nn.Module):
    """Encoder, router and decoder on the patch grid; takes the place of `DynamicChunking`.

    Args:
        channels: C of the latents.
        dim: width D of the backbone.
        conditioning: width of the conditioning vector.
        width: d, of the convolutions; None takes D / 4.
        blocks: residual blocks of encoder and of decoder.
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
        width: int | None = None,
        blocks: int = 2,
        router_dim: int | None = None,
        center_tap: bool = False,
        smoothing: float | None = 1.0,
        floor: float = 0.0,
    ) -> None:
        super().__init__()
        width, features = width or dim // 4, PATCH**2 * channels
        self.smoothing, self.floor = smoothing, floor
        # The trained model's own.
        self.embed = nn.Linear(features, dim)
        self.head = nn.Linear(dim, features)
        # New. All that reaches the trained parts begins as zero, and the router begins by keeping everything.
        self.encoder = ScaffoldEncoder(features, width, width, conditioning, blocks)
        self.join = nn.Linear(width, dim, bias=False)
        self.router = PredictabilityRouter(width, router_dim or 32, center_tap)
        self.carry = nn.Linear(dim, width)
        self.log_variance = nn.Parameter(torch.full((features,), _FIRST_VARIANCE).log())
        self.decoder = ScaffoldDecoder(features, width, 2 * features + width + 1, conditioning, blocks)
        nn.init.zeros_(self.join.weight)
        with torch.no_grad():
            self.router.head.weight.mul_(0.1)  # an order to drop them in, and no more
        nn.init.constant_(self.router.head.bias, _KEEP_ALL)  # type: ignore[arg-type]

    @classmethod
    def of_config(cls, config: Any, channels: int, dim: int, conditioning: int) -> PatchChunking:
        """The scaffold that a model's configuration describes.

        Raises:
            ValueError: it asks for what the patch grid does not have.
        """
        if config.router != "predictability" or config.residual_gate != "confidence":
            raise ValueError(
                "grid: 'patch' needs router 'predictability' and residual_gate 'confidence', "
                f"got {config.router!r} and {config.residual_gate!r}"
            )
        return cls(
            channels,
            dim,
            conditioning,
            width=config.scaffold_dim,
            blocks=config.scaffold_blocks,
            router_dim=config.router_dim,
            center_tap=config.center_tap,
            smoothing=config.smoothing,
            floor=config.floor,
        )

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
        token_budget: int | None,
        held: Chunks | None = None,
    ) -> Chunked:
        """Latents [n, C, H, W] to packed kept patches; those of `held` when given.

        Raises:
            ValueError: see `fastgen.models.chunking.check_budget`; a budget below the floor; sides that do not divide.
        """
        grid = self.grid_of(latents)
        patches = patchify(latents)
        found = self.encoder(patches.mT.unflatten(2, grid), conditioning)
        probabilities = torch.sigmoid(self.router(found, grid))
        if held is None:
            chunks = select_chunks(probabilities, grid, tail_drop, token_budget, self.floor)
        else:
            chunks = replace(held, probabilities=probabilities, natural=probabilities > THRESHOLD)
        features = self.embed(patches) + self.join(found)
        return Chunked(pack(features, chunks.packing), chunks, features)

    def predict(
        self, hidden: Tensor, chunked: Chunked, latents: Tensor, sigma: Tensor, conditioning: Tensor
    ) -> Tensor:
        """The backbone's output [T, D] on kept patches to the velocity [n, C, H, W] of all.

        Args:
            hidden: [T, D].
            chunked: of `chunk`.
            latents: x_t, [n, C, H, W].
            sigma: noise levels, [n].
            conditioning: of encoder and decoder, [n, c].
        """
        chunks = chunked.chunks
        own = self.head(hidden)
        velocity = scatter(own, chunks.packing)
        if not all(length == chunks.grid_size for length in chunks.lengths):
            noisy = patchify(latents)
            velocity = torch.where(
                chunks.mask[..., None], velocity, self._dropped(own, hidden, chunks, noisy, sigma, conditioning)
            )
        if torch.is_grad_enabled():  # one, with a gradient for the router
            velocity = velocity * straight_through(confidence(chunks))[..., None].to(velocity.dtype)
        return unpatchify(velocity, chunks.grid)

    def _dropped(
        self, own: Tensor, hidden: Tensor, chunks: Chunks, noisy: Tensor, sigma: Tensor, conditioning: Tensor
    ) -> Tensor:
        """Velocities [n, L, F] as they are filled in; only those of dropped patches count."""
        packing = chunks.packing
        levels = sigma.to(own.dtype).index_select(0, packing.sequence_ids)[:, None]
        data = pack(noisy, packing) + levels * own
        carried = torch.cat([data, self.carry(hidden)], dim=-1)
        spread = dechunk(
            carried, chunks.positions, chunks.probabilities, chunks.mask, chunks.grid, self.smoothing, chunks.rows
        )
        guess = fill_in(noisy, spread[..., : noisy.shape[-1]], sigma, self.log_variance.exp().to(noisy.dtype))
        seen = torch.cat([noisy, spread, chunks.mask[..., None].to(noisy.dtype)], dim=-1)
        correction = self.decoder(seen, chunks.grid, conditioning)
        return guess + correction.flatten(2).mT
