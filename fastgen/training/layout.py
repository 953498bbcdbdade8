"""An auxiliary target for image models: which shape and colour covers each patch.

Flow matching and next-token prediction spend most of their loss on background texture that nothing can predict; what
a caption asks for is a small part of it. A linear head that reads shape and colour of every patch from a hidden state
gives that part a loss of its own, in the spirit of representation alignment (REPA, arXiv 2410.06940) with the
renderer's truth in place of a pretrained encoder. The head is dropped when the model is exported.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from fastgen.data.shapes import COLORS, SHAPES, ShapesBatch

_COVERED = 0.25  # share of a patch that an object must cover to name it


def patch_labels(batch: ShapesBatch, patch: int) -> dict[str, torch.Tensor]:
    """Labels of the `patch` x `patch` pixel patches in raster order.

    Args:
        batch: renders with truth.
        patch: side of a patch in pixels; a divisor of the image side.

    Returns:
        "patch_shapes" and "patch_colors", int64 [n, patches]: 0 background, 1 + index into SHAPES or COLORS of the
        object that covers most of the patch (and at least a quarter of it).
    """
    n, side = batch.instances.shape[:2]
    grid = side // patch
    blocks = batch.instances.reshape(n, grid, patch, grid, patch)
    slots = max((len(scene) for scene in batch.scenes), default=1)
    covered = np.stack([(blocks == slot + 1).mean(axis=(2, 4)) for slot in range(slots)], axis=-1)
    owner = np.where(covered.max(axis=-1) >= _COVERED, covered.argmax(axis=-1) + 1, 0).reshape(n, grid * grid)
    shapes, colors = np.zeros((n, slots + 1), np.int64), np.zeros((n, slots + 1), np.int64)
    for index, scene in enumerate(batch.scenes):
        for slot, item in enumerate(scene):
            shapes[index, slot + 1] = SHAPES.index(item.shape) + 1
            colors[index, slot + 1] = COLORS.index(item.color) + 1
    return {
        "patch_shapes": torch.from_numpy(np.take_along_axis(shapes, owner, axis=1)),
        "patch_colors": torch.from_numpy(np.take_along_axis(colors, owner, axis=1)),
    }


class LayoutHead(torch.nn.Module):
    """Linear read-out of shape and colour from hidden states of width `width`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width, elementwise_affine=False)
        self.linear = torch.nn.Linear(width, 2 + len(SHAPES) + len(COLORS))

    def forward(self, hidden: torch.Tensor, shapes: torch.Tensor, colors: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of both labels.

        Args:
            hidden: [n, patches, width].
            shapes, colors: int64 [n, patches].
        """
        logits = self.linear(self.norm(hidden)).float().flatten(0, 1)
        shape_logits, color_logits = logits.split([1 + len(SHAPES), 1 + len(COLORS)], dim=-1)
        return F.cross_entropy(shape_logits, shapes.flatten()) + F.cross_entropy(color_logits, colors.flatten())
