"""The auxiliary layout labels and loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastgen.data.shapes import COLORS, SHAPES, ShapesWorld
from fastgen.training.layout import LayoutHead, early_patches, patch_labels


@pytest.mark.parametrize("patch", [4, 8])
def test_labels_equal_a_patch_by_patch_count(patch: int) -> None:
    batch = ShapesWorld(21).batch(30)
    labels = patch_labels(batch, patch)
    for n, scene in enumerate(batch.scenes):
        for index in range((64 // patch) ** 2):
            row, column = divmod(index, 64 // patch)
            area = batch.instances[n, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            counts = [int((area == slot + 1).sum()) for slot in range(len(scene))]
            best = int(np.argmax(counts))
            named = counts[best] * 4 >= patch * patch
            shape = SHAPES.index(scene[best].shape) + 1 if named else 0
            color = COLORS.index(scene[best].color) + 1 if named else 0
            assert (int(labels["patch_shapes"][n, index]), int(labels["patch_colors"][n, index])) == (shape, color)


def test_upcoming_objects_are_those_that_begin_from_a_patch_on() -> None:
    """Against a walk over the patches from the last to the first."""
    batch = ShapesWorld(23).batch(40)
    labels = patch_labels(batch, 4, upcoming=True)
    for n, scene in enumerate(batch.scenes):
        owners = []
        for index in range(256):
            row, column = divmod(index, 16)
            area = batch.instances[n, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
            counts = [int((area == slot + 1).sum()) for slot in range(len(scene))]
            owners.append(int(np.argmax(counts)) if max(counts) >= 4 else None)
        begun, coming = None, [None] * 256
        for index in reversed(range(256)):
            if owners[index] is not None and owners[index] not in owners[:index]:
                begun = owners[index]
            coming[index] = begun
        for index, slot in enumerate(coming):
            shape, color = (0, 0) if slot is None else (
                SHAPES.index(scene[slot].shape) + 1, COLORS.index(scene[slot].color) + 1
            )  # fmt: skip
            assert (int(labels["next_shapes"][n, index]), int(labels["next_colors"][n, index])) == (shape, color)


def test_an_untrained_head_is_uniform_and_it_can_learn() -> None:
    """With zero weights the loss is log 9 + log 9; hidden states that hold the labels can be read out."""
    labels = patch_labels(ShapesWorld(22).batch(8), 8)
    head = LayoutHead(64)
    torch.nn.init.zeros_(head.linear.weight)
    torch.nn.init.zeros_(head.linear.bias)
    torch.manual_seed(0)
    hidden = torch.randn(9, 64)[labels["patch_shapes"]] + torch.randn(9, 64)[labels["patch_colors"]]
    loss = head(hidden, labels["patch_shapes"], labels["patch_colors"])
    assert math.isclose(float(loss.detach()), 2 * math.log(9), rel_tol=1e-5)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss = head(hidden, labels["patch_shapes"], labels["patch_colors"])
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05


def test_early_patches_look_back_only() -> None:
    """Against a walk over neighbours; and later patches change nothing, so that no loss is weighted by its answer."""
    rng = np.random.default_rng(0)
    owner = rng.integers(0, 4, (20, 25)) * (rng.random((20, 25)) < 0.5)
    found = early_patches(owner, 5, most=2)
    for n in range(20):
        for index in range(25):
            row, column = divmod(index, 5)
            around = [(row, column - 1), (row - 1, column - 1), (row - 1, column), (row - 1, column + 1)]
            near = {int(owner[n, r * 5 + c]) for r, c in around if r >= 0 and 0 <= c < 5} - {0}
            assert found[n, index] == any(1 <= (owner[n, :index] == slot).sum() <= 2 for slot in near)
    for index in range(25):
        other = owner.copy()
        other[:, index:] = rng.integers(0, 4, (20, 25 - index))
        assert np.array_equal(early_patches(other, 5, most=2)[:, : index + 1], found[:, : index + 1])


def test_weights_multiply_the_losses_of_patches() -> None:
    labels = patch_labels(ShapesWorld(22).batch(2), 8)
    head, hidden = LayoutHead(16), torch.randn(2, 64, 16)
    values = labels["patch_shapes"], labels["patch_colors"]
    half = torch.zeros(2, 64)
    half[:, :32] = 2
    alone = head(hidden[:, :32], *(value[:, :32] for value in values))
    assert torch.allclose(head(hidden, *values, half), alone)
    assert torch.allclose(head(hidden, *values, torch.ones(2, 64)), head(hidden, *values))


def test_an_empty_batch_has_no_labels() -> None:
    labels = patch_labels(ShapesWorld(0).batch(0), 8, upcoming=True)
    assert {tuple(values.shape) for values in labels.values()} == {(0, 64)} and len(labels) == 5
