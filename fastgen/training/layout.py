"""An auxiliary loss for image models: which shape and colour covers each patch.

Most of the loss of flow matching and next-token prediction is unpredictable background texture; the content of the
caption is a small part. A linear head predicts shape and colour of every patch from a hidden state, which gives that
part its own loss, as in representation alignment (REPA, arXiv 2410.06940) with the renderer's ground truth instead of
a pretrained encoder. The head is not exported.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from fastgen.data.shapes import COLORS, SHAPES, ShapesBatch

_COVERED = 0.25  # share of a patch that an object must cover to be its label


def patch_labels(batch: ShapesBatch, patch: int, upcoming: bool = False) -> dict[str, torch.Tensor]:
    """Labels of the `patch` x `patch` pixel patches in raster order.

    Args:
        batch: renders with ground truth.
        patch: side of a patch in pixels; a divisor of the image side.
        upcoming: also label the object that begins next, which an autoregressive model has to plan.

    Returns:
        "patch_shapes" and "patch_colors", int64 [n, patches]: 0 background, 1 + index into SHAPES or COLORS of the
        object that covers most of the patch (and at least a quarter of it). With `upcoming` also "next_shapes" and
        "next_colors" of the first object that begins in this patch or a later one, 0 for none; and "early", float32,
        see `early_patches`.
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
    owners = {"patch": owner, "next": _upcoming(owner, slots)} if upcoming else {"patch": owner}
    labels = {
        f"{kind}_{name}": torch.from_numpy(np.take_along_axis(values, who, axis=1))
        for kind, who in owners.items()
        for name, values in (("shapes", shapes), ("colors", colors))
    }
    if upcoming:
        labels["early"] = torch.from_numpy(early_patches(owner, grid))
    return labels


def _upcoming(owner: np.ndarray, slots: int) -> np.ndarray:
    """For each patch [n, P], the object (1 …) whose first patch comes next, this patch included; 0 for none."""
    patches = owner.shape[1]
    present = owner[:, None, :] == np.arange(1, slots + 1)[None, :, None]
    first = np.where(present.any(axis=2), present.argmax(axis=2), -1)[:, None, :]  # [n, 1, slots]
    ahead = np.where(first >= np.arange(patches)[None, :, None], first, patches)
    return np.where(ahead.min(axis=2) < patches, ahead.argmin(axis=2) + 1, 0)


def early_patches(owner: np.ndarray, grid: int, most: int = 8) -> np.ndarray:
    """1 where, in raster order, an object has begun and its shape is not yet determined, else 0.

    A patch counts if its left neighbour or one of the three above it belongs to an object with 1 to `most` earlier
    patches. That depends only on earlier patches, so weighting a next-token loss by it does not change the minimiser.

    Args:
        owner: int [n, grid * grid], the object (1 …) of each patch, 0 for none.
        grid: patches per row.

    Returns:
        float32 [n, grid * grid].
    """
    n = len(owner)
    found = np.zeros(owner.shape, bool)
    for slot in range(1, owner.max(initial=0) + 1):
        own = owner == slot
        before = own.cumsum(axis=1) - own
        padded = np.pad(own.reshape(n, grid, grid), ((0, 0), (1, 0), (1, 1)))
        left, above = padded[:, 1:, :-2], padded[:, :-1]
        adjacent = left | above[:, :, :-2] | above[:, :, 1:-1] | above[:, :, 2:]
        found |= adjacent.reshape(owner.shape) & (before <= most)
    return found.astype(np.float32)


class LayoutHead(torch.nn.Module):
    """Linear prediction of shape and colour from hidden states of width `width`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width, elementwise_affine=False)
        self.linear = torch.nn.Linear(width, 2 + len(SHAPES) + len(COLORS))

    def forward(
        self, hidden: torch.Tensor, shapes: torch.Tensor, colors: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean cross-entropy of both labels.

        Args:
            hidden: [n, patches, width].
            shapes, colors: int64 [n, patches].
            weights: [n, patches], weights of the patches' losses; None means 1.
        """
        logits = self.linear(self.norm(hidden)).float().flatten(0, 1)
        shape_logits, color_logits = logits.split([1 + len(SHAPES), 1 + len(COLORS)], dim=-1)
        losses = F.cross_entropy(shape_logits, shapes.flatten(), reduction="none")
        losses = losses + F.cross_entropy(color_logits, colors.flatten(), reduction="none")
        return (losses if weights is None else losses * weights.flatten()).mean()
