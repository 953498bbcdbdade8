"""Stand-ins for the trained networks, exact where the truth is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from fastgen.data.shapes import COLORS, SHAPES, ShapesBatch


def raw_detections(objects: list[tuple], size: int = 64) -> SimpleNamespace:
    """Network output for (shape, color, score, box, mask or None) objects."""
    n = len(objects)
    probs = torch.zeros(n, len(COLORS))
    masks = torch.zeros(n, size, size, dtype=torch.bool)
    for row, (_, color, _, box, mask) in enumerate(objects):
        probs[row, COLORS.index(color)] = 1.0
        x1, y1, x2, y2 = (int(v) for v in box)
        if mask is None:
            masks[row, y1:y2, x1:x2] = True
        else:
            masks[row] = torch.from_numpy(mask)
    return SimpleNamespace(
        labels=torch.tensor([SHAPES.index(o[0]) for o in objects], dtype=torch.long),
        colors=torch.tensor([COLORS.index(o[1]) for o in objects], dtype=torch.long),
        color_probs=probs,
        scores=torch.tensor([o[2] for o in objects], dtype=torch.float32),
        boxes=torch.tensor([list(o[3]) for o in objects], dtype=torch.float32).reshape(-1, 4),
        masks=masks,
    )


class FakeModel:
    """A detector network whose features are a fixed random projection of the pixels; subclasses say what it sees."""

    dims = 16

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.projection = torch.randn(3 * 8 * 8, self.dims, generator=generator)

    def detect(self, images: torch.Tensor) -> list[SimpleNamespace]:
        return [raw_detections(self.see(image.numpy())) for image in images]

    def see(self, image: np.ndarray) -> list[tuple]:
        return []

    def features(self, images: torch.Tensor) -> torch.Tensor:
        small = images.permute(0, 3, 1, 2).float().unfold(2, 8, 8).unfold(3, 8, 8).mean((-1, -2)) / 255
        return small.flatten(1) @ self.projection

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"projection": self.projection}


class KnowingModel(FakeModel):
    """Sees in each known render exactly its objects, and nothing in any other picture."""

    score = 0.99

    def __init__(self, batch: ShapesBatch) -> None:
        super().__init__()
        self.batch = batch
        self.index = {image.tobytes(): i for i, image in enumerate(batch.images)}

    def see(self, image: np.ndarray) -> list[tuple]:
        i = self.index.get(image.tobytes())
        return [] if i is None else [self.object(i, slot) for slot in range(len(self.batch.scenes[i]))]

    def object(self, i: int, slot: int) -> tuple:
        item, mask = self.batch.scenes[i][slot], self.batch.instances[i] == slot + 1
        rows, columns = np.nonzero(mask)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        return item.shape, item.color, self.score, box, mask


class PixelModel(FakeModel):
    """Reads what it sees from the first pixels: a pure function of the picture."""

    def see(self, image: np.ndarray) -> list[tuple]:
        objects = []
        for slot in range(int(image[0, 0, 0]) % 4):
            shape, color, place = (int(v) for v in image[0, 1 + slot])
            x, y = place % 48, place // 4 % 48
            objects.append((SHAPES[shape % 8], COLORS[color % 8], 0.95 - 0.01 * slot, (x, y, x + 12, y + 12), None))
        return objects
