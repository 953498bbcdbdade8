"""Recipe `detector`: the ShapesWorld detector, trained on renders with blur, noise and colour shifts."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastgen.data.distractors import with_distractors
from fastgen.data.shapes import COLORS, SHAPES, ShapesBatch, ShapesWorld
from fastgen.models.shapes_detector import BOX_SCALE, STRIDE, ShapesDetector, cell_centres
from fastgen.training.cards import write_record
from fastgen.training.vae import to_pixels

_EMPTY = 0.25  # share of training pictures with distractors only
_MIXED = 0.3  # share of the others with distractors next to the objects
_INNER = 0.5  # cells within this share of the half box are positives; those between it and 1 are ignored


def blur(pixels: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of [n, 3, H, W] with standard deviation `sigma` pixels, edges replicated."""
    if sigma <= 0:
        return pixels
    radius = max(1, math.ceil(3 * sigma))
    x = torch.arange(-radius, radius + 1, dtype=pixels.dtype, device=pixels.device)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(pixels, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(3, 1, -1, 1), groups=3)
    return F.conv2d(rows, kernel.view(1, 1, 1, -1).expand(3, 1, 1, -1), groups=3)


def detection_targets(batch: ShapesBatch) -> dict[str, torch.Tensor]:
    """Targets on the stride-4 grid from true instance maps.

    Returns:
        owner: int64 [n, h, w], index of the object that a cell predicts, -1 background, -2 ignored.
        shapes, colors: int64 [n, h, w] of the owner (0 without one).
        distances: float [n, h, w, 4] from the cell centre to the owner's tight box, in pixels.
        mask: float [n, H, W].
    """
    n, height, width = batch.instances.shape
    centres = cell_centres(height // STRIDE, width // STRIDE)
    owner = torch.full((n, *centres.shape[:2]), -1, dtype=torch.long)
    shapes, colors = torch.zeros_like(owner), torch.zeros_like(owner)
    distances = torch.zeros(*owner.shape, 4)
    instances = torch.from_numpy(batch.instances)
    for index, scene in enumerate(batch.scenes):
        for k, item in enumerate(scene):
            ys, xs = torch.nonzero(instances[index] == k + 1, as_tuple=True)
            low = torch.stack([xs.min(), ys.min()]).float()
            high = torch.stack([xs.max(), ys.max()]).float() + 1
            relative = ((centres - (low + high) / 2) / ((high - low) / 2)).abs().amax(dim=-1)
            owner[index][(relative < 1) & (owner[index] < 0)] = -2
            inner = relative < _INNER
            owner[index][inner] = k
            shapes[index][inner] = SHAPES.index(item.shape)
            colors[index][inner] = COLORS.index(item.color)
            distances[index][inner] = torch.cat([centres[inner] - low, high - centres[inner]], dim=-1)
    return {
        "owner": owner,
        "shapes": shapes,
        "colors": colors,
        "distances": distances,
        "mask": (instances > 0).float(),
    }


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur a quarter of the batch; apply separate noise, gain, offset and channel gains to every image."""
    n = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        values = torch.rand(n, *shape, generator=generator) * (high - low) + low
        return values.to(pixels.device)

    quarter = n // 4
    sigma = float(torch.rand((), generator=generator)) * 1.2
    pixels = torch.cat([blur(pixels[:quarter], sigma), pixels[quarter:]])
    pixels = pixels * uniform(0.85, 1.15, 1, 1, 1) * uniform(0.93, 1.07, 3, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1)
    noise = torch.randn(pixels.shape, generator=generator).to(pixels.device)
    # Squared, so that most images have little noise.
    return (pixels + noise * 0.25 * uniform(0.0, 1.0, 1, 1, 1).square()).clamp(-1, 1)


class DetectorRecipe:
    """Objectness, class, colour, box and mask losses on augmented renders.

    Args:
        seed: seed of weights and data.
    """

    name = "detector"

    def __init__(self, seed: int = 0) -> None:
        self.data = ShapesWorld(seed + 505, held_out=False)

    def build(self) -> ShapesDetector:
        """The detector with new weights."""
        return ShapesDetector(shapes=SHAPES, colors=COLORS).to(memory_format=torch.channels_last)

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Renders with targets; some with distractors, which count as background."""
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        data = with_distractors(self.data.batch(size, start), rng, empty=_EMPTY, mixed=_MIXED)
        return {"images": torch.from_numpy(data.images), **detection_targets(data)}

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Sum of the five losses."""
        output = module(augment(to_pixels(batch["images"]), generator))
        owner = batch["owner"]
        positive, counted = owner >= 0, owner != -2
        objectness = F.binary_cross_entropy_with_logits(output.objectness[counted], positive[counted].float())
        # Sums over cells with an object, not means: a small batch may have distractors only.
        objects = max(1, int(positive.sum()))
        shapes = F.cross_entropy(output.shapes[positive], batch["shapes"][positive], reduction="sum") / objects
        colors = F.cross_entropy(output.colors[positive], batch["colors"][positive], reduction="sum") / objects
        predicted, true = output.distances[positive].float() / BOX_SCALE, batch["distances"][positive] / BOX_SCALE
        box = F.smooth_l1_loss(predicted, true, beta=0.05, reduction="sum") / (4 * objects)
        target = F.avg_pool2d(batch["mask"][:, None], 2)[:, 0]
        mask = F.binary_cross_entropy_with_logits(output.mask, target)
        with torch.no_grad():
            right = output.shapes[positive].argmax(-1) == batch["shapes"][positive]
        loss = 4.0 * objectness + shapes + 0.5 * colors + 2.0 * box + mask
        return loss, {"objectness": float(objectness.detach()), "shape_accuracy": float(right.sum()) / objects}

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Save the detector to `folder` in half precision."""
        copy.deepcopy(module).to(torch.float16).save_pretrained(folder)  # type: ignore[operator]
        write_record(folder, "detector", record)
