"""An auxiliary target for image models: which shape and colour covers each patch.

Flow matching and next-token prediction spend most of their loss on background texture that nothing can predict; what
a caption asks for is a small part of it. A linear head that reads shape and colour of every patch from a hidden state
gives that part a loss of its own, in the spirit of representation alignment (REPA, arXiv 2410.06940) with the
renderer's truth in place of a pretrained encoder. An autoregressive model also has to plan: a second head reads the
object that begins next. The heads are dropped when the model is exported.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from fastgen.data.shapes import COLORS, SHAPES, ShapesBatch

_COVERED = 0.25  # share of a patch that an object must cover to name it


def patch_labels(batch: ShapesBatch, patch: int, upcoming: bool = False) -> dict[str, torch.Tensor]:
    """Labels of the `patch` x `patch` pixel patches in raster order.

    Args:
        batch: renders with truth.
        patch: side of a patch in pixels; a divisor of the image side.
        upcoming: label also what an autoregressive model has to plan: the object that begins next.

    Returns:
        "patch_shapes" and "patch_colors", int64 [n, patches]: 0 background, 1 + index into SHAPES or COLORS of the
        object that covers most of the patch (and at least a quarter of it). With `upcoming` also "next_shapes",
        "next_colors" and "next_columns": of the first object that begins in this patch or a later one, 0 when none
        does; the column is 1 + that of the object's first patch.
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
    named = {"patch_shapes": (shapes, owner), "patch_colors": (colors, owner)}
    if upcoming:
        coming, begins = _upcoming(owner, slots)
        columns = np.where(coming > 0, 1 + begins % grid, 0)
        named |= {"next_shapes": (shapes, coming), "next_colors": (colors, coming)}
    labels = {name: np.take_along_axis(values, who, axis=1) for name, (values, who) in named.items()}
    if upcoming:
        labels["next_columns"] = columns
    return {name: torch.from_numpy(values) for name, values in labels.items()}


def _upcoming(owner: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """For each patch [n, P] the object (1 …) whose first patch comes next, from this one on, and that patch's index;
    0 and P where none comes."""
    patches = owner.shape[1]
    present = owner[:, None, :] == np.arange(1, slots + 1)[None, :, None]
    first = np.where(present.any(axis=2), present.argmax(axis=2), -1)[:, None, :]  # [n, 1, slots]
    ahead = np.where(first >= np.arange(patches)[None, :, None], first, patches)
    begins = ahead.min(axis=2)
    return np.where(begins < patches, ahead.argmin(axis=2) + 1, 0), begins


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


class PlanHead(torch.nn.Module):
    """Read-out of the object that begins next: its shape, and given its shape its colour and its column.

    Which of a caption's objects comes first is open until it begins, and the marginals of colour and column say
    nothing of "a red circle left of a blue star" then. Given the shape they do: what the caption binds together is
    learnt at every patch, not only inside objects.
    """

    def __init__(self, width: int, columns: int, hidden: int = 128) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width, elementwise_affine=False)
        self.shape = torch.nn.Linear(width, 1 + len(SHAPES))
        self.enter = torch.nn.Linear(width, hidden)
        self.given = torch.nn.Embedding(1 + len(SHAPES), hidden)
        self.leave = torch.nn.Linear(hidden, 1 + len(COLORS) + 1 + columns)

    def forward(
        self, hidden: torch.Tensor, shapes: torch.Tensor, colors: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Mean cross-entropy of all three labels.

        Args:
            hidden: [n, patches, width].
            shapes, colors, columns: int64 [n, patches], the "next_…" of `patch_labels`.
        """
        normed = self.norm(hidden).flatten(0, 1)
        shape_logits = self.shape(normed).float()
        rest = self.leave(F.gelu(self.enter(normed) + self.given(shapes.flatten()))).float()
        color_logits, column_logits = rest.split([1 + len(COLORS), rest.shape[1] - 1 - len(COLORS)], dim=1)
        return (
            F.cross_entropy(shape_logits, shapes.flatten())
            + F.cross_entropy(color_logits, colors.flatten())
            + F.cross_entropy(column_logits, columns.flatten())
        )
