"""The detector's geometry: targets decode back to the truth, suppression, masks, input checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastgen.data.shapes import COLORS, SHAPES, ShapesWorld
from fastgen.models.shapes_detector import DetectorOutput, ShapesDetector, pairwise_iou
from fastgen.training.detector import detection_targets


class _Oracle(ShapesDetector):
    """A detector whose maps are the training targets: what a perfect network would say."""

    def __init__(self, targets: dict[str, torch.Tensor]) -> None:
        super().__init__(shapes=SHAPES, colors=COLORS, width=16, depth=1, feature_dim=16)
        self.targets = targets

    def forward(self, pixels: torch.Tensor) -> DetectorOutput:
        targets = self.targets
        positive = targets["owner"] >= 0

        def sure(index: torch.Tensor, count: int) -> torch.Tensor:
            return torch.nn.functional.one_hot(index, count).float() * 20

        mask = torch.nn.functional.avg_pool2d(targets["mask"][:, None], 2)[:, 0] * 2 - 1
        return DetectorOutput(
            torch.where(positive, 10.0, -10.0),
            sure(targets["shapes"], len(SHAPES)),
            sure(targets["colors"], len(COLORS)),
            targets["distances"].clamp(min=0.01),
            mask,
            torch.zeros(len(pixels), 16),
        )


def test_perfect_maps_give_back_the_truth() -> None:
    """Targets -> maps -> detect recovers every object: class, colour, box within a hair, mask by IoU."""
    batch = ShapesWorld(9).batch(100)
    detections = _Oracle(detection_targets(batch)).detect(torch.from_numpy(batch.images))
    for scene, instances, found in zip(batch.scenes, batch.instances, detections, strict=True):
        assert len(found.labels) == len(scene)
        truth = torch.from_numpy(instances)
        for k, item in enumerate(scene):
            mask = truth == k + 1
            ys, xs = torch.nonzero(mask, as_tuple=True)
            box = torch.tensor([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]]).float()
            overlap = pairwise_iou(box, found.boxes)[0]
            best = int(overlap.argmax())
            assert overlap[best] > 0.999
            assert SHAPES[int(found.labels[best])] == item.shape and COLORS[int(found.colors[best])] == item.color
            union = (found.masks[best] | mask).sum()
            assert (found.masks[best] & mask).sum() / union > 0.7


def test_targets_own_at_least_one_cell_each() -> None:
    batch = ShapesWorld(10).batch(200)
    owner = detection_targets(batch)["owner"]
    for scene, cells in zip(batch.scenes, owner, strict=True):
        assert set(range(len(scene))) <= set(cells.unique().tolist())


def test_iou_against_pixel_counting() -> None:
    torch.manual_seed(0)
    low = torch.randint(0, 20, (30, 2))
    boxes = torch.cat([low, low + torch.randint(1, 20, (30, 2))], dim=1)
    grids = torch.zeros(30, 40, 40, dtype=torch.bool)
    for grid, (x0, y0, x1, y1) in zip(grids, boxes.tolist(), strict=True):
        grid[y0:y1, x0:x1] = True
    inter = (grids[:, None] & grids[None]).sum(dim=(2, 3)).double()
    union = (grids[:, None] | grids[None]).sum(dim=(2, 3)).double()
    torch.testing.assert_close(pairwise_iou(boxes.double(), boxes.double()), inter / union)


def test_layouts_sizes_and_empty_pictures() -> None:
    model = ShapesDetector(shapes=SHAPES, colors=COLORS).eval()
    images = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    torch.testing.assert_close(model.features(images), model.features(images.permute(0, 3, 1, 2)))
    assert model.features(images).shape == (2, 128)
    empty = model.detect(images, threshold=1.0)
    assert [len(item.scores) for item in empty] == [0, 0]
    assert empty[0].masks.shape == (0, 32, 48) and empty[0].boxes.shape == (0, 4)
    assert model.detect(images[:0]) == []


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 64, 64, 3),
        torch.zeros(64, 64, 3, dtype=torch.uint8),
        torch.zeros(1, 64, 64, 4, dtype=torch.uint8),
        torch.zeros(1, 62, 64, 3, dtype=torch.uint8),
    ],
)
def test_bad_images_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="images must be|multiples of 4"):
        ShapesDetector(shapes=SHAPES, colors=COLORS).detect(images)


def test_save_and_load(tmp_path: Path) -> None:
    model = ShapesDetector(shapes=SHAPES, colors=COLORS, width=32, depth=2, feature_dim=64).eval()
    model.save_pretrained(tmp_path)
    loaded = ShapesDetector.from_pretrained(tmp_path).eval()
    images = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    torch.testing.assert_close(model.features(images), loaded.features(images))
    assert tuple(loaded.config.shapes) == SHAPES
