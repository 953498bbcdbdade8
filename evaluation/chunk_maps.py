"""Where a model with dynamic chunking spends its compute: x_t, boundary probabilities and kept tokens over time.

The figure of arXiv 2603.06351 that shows how the kept set grows from noisy to clean steps, from any
`DCPipelineOutput` with recorded steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastgen.evaluation.report import contact_sheet
from fastgen.models.elastic import StepRecord

# Dark violet to yellow; lightness rises evenly, so the map reads in grey too.
_HEAT = np.array([[13, 8, 60], [84, 15, 109], [171, 51, 95], [236, 105, 56], [252, 194, 60], [252, 255, 190]], float)


def heat_map(values: np.ndarray[Any, Any]) -> Image.Image:
    """Values in [0, 1], [H, W], as colours."""
    scaled = np.clip(values, 0, 1) * (len(_HEAT) - 1)
    low = np.minimum(scaled.astype(int), len(_HEAT) - 2)
    share = (scaled - low)[..., None]
    return Image.fromarray(np.rint(_HEAT[low] * (1 - share) + _HEAT[low + 1] * share).astype(np.uint8))


def kept_map(picture: Image.Image, mask: np.ndarray[Any, Any]) -> Image.Image:
    """The picture with dropped cells darkened: mask [h, w] of a grid over it."""
    image = np.asarray(picture.convert("RGB"), dtype=float)
    size = (picture.width, picture.height)
    cells = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)) > 0
    return Image.fromarray(np.where(cells[..., None], image, 0.25 * image).astype(np.uint8))


@torch.no_grad()
def decoded(vae: Any, latents: torch.Tensor) -> list[Image.Image]:
    """Pictures of scaled latents [n, C, H, W], noisy or not."""
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    pixels = ((vae.decode(latents).sample.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def chunk_sheet(
    vae: Any, records: Sequence[StepRecord], picture: Image.Image, sample: int = 0, most: int = 8
) -> Image.Image:
    """Three rows over the steps: x_t, boundary probabilities, kept tokens over the final picture.

    Args:
        vae: decodes x_t.
        records: of all steps, `DCPipelineOutput.steps`.
        picture: the final picture.
        sample: which one of the batch.
        most: columns; more steps are thinned out evenly.

    Raises:
        ValueError: no records, no such sample, or most < 1.
    """
    if not records or most < 1 or not 0 <= sample < records[0].chunks.samples:
        raise ValueError(f"chunk_sheet: {len(records)} records, sample {sample}, most {most}: nothing to show")
    chosen = np.unique(np.linspace(0, len(records) - 1, min(most, len(records))).round().astype(int))
    noisy, probabilities, kept, captions = [], [], [], []
    for step in chosen:
        chunks = records[step].chunks
        noisy += decoded(vae, records[step].latents[sample : sample + 1])
        probabilities.append(heat_map(chunks.probabilities[sample].float().view(chunks.grid).cpu().numpy()))
        kept.append(kept_map(picture, chunks.mask[sample].view(chunks.grid).cpu().numpy()))
        captions.append(f"step {step + 1}: {chunks.lengths[sample]} of {chunks.grid_size}")
    rows = [*noisy, *probabilities, *kept]
    return contact_sheet(rows, ["x_t"] * len(noisy) + ["probability"] * len(noisy) + captions, columns=len(chosen))
