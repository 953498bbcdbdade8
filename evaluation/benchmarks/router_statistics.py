"""Tokens kept by the router of a DC-DiT by noise level and place (arXiv 2603.06351, its figure of maps).

Measured on ShapesWorld renders, whose truth says which positions of the latent grid are on an object's boundary: a
position is on one when its pixels do not all belong to the same object (or background).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import ZImagePipeline

from fastgen.data.shapes import ShapesBatch, ShapesWorld
from fastgen.errors import FastgenError

SIGMAS = (0.95, 0.85, 0.7, 0.5, 0.3, 0.15, 0.05)
_FIRST = 40_000_000  # far beyond what training sees
_BATCH = 32


def cell_kinds(batch: ShapesBatch, grid: int) -> dict[str, np.ndarray[Any, Any]]:
    """The content of the cells of a `grid` x `grid` grid over the pictures.

    Returns:
        bool [n, grid * grid] each: "boundary" (pixels of an object and of something else), "inside" (one object
        only), "background" (no object in it nor in the eight cells around it). Cells next to an object are none of
        these: the receptive field of a latent position reaches into them.
    """
    n, side = batch.instances.shape[:2]
    size = side // grid
    blocks = batch.instances.reshape(n, grid, size, grid, size)
    low, high = blocks.min(axis=(2, 4)), blocks.max(axis=(2, 4))
    occupied = np.pad(high > 0, ((0, 0), (1, 1), (1, 1)))
    near = np.zeros_like(low, dtype=bool)
    for row in range(3):
        for column in range(3):
            near |= occupied[:, row : row + grid, column : column + grid]
    kinds = {"boundary": low != high, "inside": (low == high) & (low > 0), "background": ~near}
    return {name: where.reshape(n, grid * grid) for name, where in kinds.items()}


@torch.no_grad()
def router_statistics(pipe: ZImagePipeline, renders: int = 256, seed: int = 0, size: int = 64) -> dict[str, Any]:
    """Natural kept share and mean boundary probability of each kind of cell, by noise level.

    Args:
        pipe: a Z-Image pipeline whose transformer has dynamic chunking.
        renders: fresh pictures, captioned, at every noise level.
        seed: of renders and noise.
        size: pixels a side of the renders, a multiple of 64.

    Returns:
        a JSON-ready dict: "renders", "seed", "compression" (training aims at one kept token in so many), "rows" from
        noisy to clean with sigma, kept, and the mean p of boundary, inside and background cells;
        "boundary_to_background", the ratio of the means over all rows.

    Raises:
        FastgenError: renders < 1, or a transformer without dynamic chunking.
    """
    if renders < 1:
        raise FastgenError(f"renders: {renders} is not allowed, needs an integer >= 1")
    if not hasattr(pipe.transformer, "scaffold"):
        raise FastgenError(f"{type(pipe.transformer).__name__} has no dynamic chunking")
    world, device = ShapesWorld(seed, size=size), pipe.transformer.device
    sums: dict[float, dict[str, list[float]]] = {sigma: {} for sigma in SIGMAS}
    for start in range(0, renders, _BATCH):
        batch = world.batch(min(_BATCH, renders - start), _FIRST + start)
        generator = torch.Generator().manual_seed(seed + start)
        latents = _latents(pipe.vae, batch.images)
        captions, _ = pipe.encode_prompt(batch.texts, device=device, do_classifier_free_guidance=False)
        for sigma in SIGMAS:
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            noisy = ((1 - sigma) * latents + sigma * noise).to(pipe.transformer.dtype)
            level = torch.full((len(noisy),), 1 - sigma, device=device, dtype=noisy.dtype)
            output = pipe.transformer(list(noisy[:, :, None].unbind(0)), level, captions, output_chunks=True)
            p = output.chunks.probabilities.float().cpu().numpy()
            kinds = cell_kinds(batch, output.chunks.grid[1])  # of latent positions, or of patches
            found = {"kept": output.chunks.natural.float().cpu().numpy().ravel()}
            found |= {name: p[where] for name, where in kinds.items()}
            for name, values in found.items():
                total = sums[sigma].setdefault(name, [0.0, 0.0])
                total[0] += float(values.sum())
                total[1] += values.size
    rows = [
        {"sigma": sigma, **{name: total / max(count, 1) for name, (total, count) in of.items()}}
        for sigma, of in sums.items()
    ]
    boundary, background = (float(np.mean([row[name] for row in rows])) for name in ("boundary", "background"))
    return {
        "renders": renders,
        "seed": seed,
        "compression": pipe.transformer.config.compression,
        "rows": rows,
        "boundary_to_background": boundary / background,
    }


def _latents(vae: Any, images: np.ndarray[Any, Any]) -> torch.Tensor:
    """Scaled latents of uint8 pictures [n, H, W, 3], the posterior's mean."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
    mean: torch.Tensor = vae.encode(pixels).latent_dist.mean
    return (mean - vae.config.shift_factor) * vae.config.scaling_factor
