"""A small one-stage detector of ShapesWorld objects: class, colour, box, mask and confidence.

Every cell of a stride-4 grid that lies well inside an object predicts that object (dense positives as in FCOS), so
the confidence saturates inside objects instead of being split between the cells around a centre; overlapping
predictions of one object are merged by non-maximum suppression.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

STRIDE = 4
BOX_SCALE = 16.0
"""Box distances are predicted in units of this many pixels."""


@dataclass(frozen=True, slots=True)
class ShapeDetections:
    """Detections in one image, sorted by falling score.

    Args:
        labels: int64 [n], index into `config.shapes`.
        colors: int64 [n], index into `config.colors`.
        color_probs: float [n, colours].
        scores: float [n] in [0, 1].
        boxes: float [n, 4], x0 y0 x1 y1 in pixels, right and bottom exclusive.
        masks: bool [n, H, W].
    """

    labels: torch.Tensor
    colors: torch.Tensor
    color_probs: torch.Tensor
    scores: torch.Tensor
    boxes: torch.Tensor
    masks: torch.Tensor


@dataclass(frozen=True, slots=True)
class DetectorOutput:
    """Raw maps on the stride-4 grid (h = H / 4), and the mask on the stride-2 grid.

    Args:
        objectness: logits [n, h, w].
        shapes: logits [n, h, w, shapes].
        colors: logits [n, h, w, colours].
        distances: [n, h, w, 4], left, top, right, bottom from the cell centre in pixels, positive.
        mask: foreground logits [n, H / 2, W / 2].
        features: [n, feature_dim], the penultimate map averaged over the image.
    """

    objectness: torch.Tensor
    shapes: torch.Tensor
    colors: torch.Tensor
    distances: torch.Tensor
    mask: torch.Tensor
    features: torch.Tensor


class ResidualBlock(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.norm2 = nn.GroupNorm(8, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))


class ShapesDetector(ModelMixin, ConfigMixin):
    """The detector network.

    Args:
        shapes: class names.
        colors: colour names.
        width: channels of the trunk.
        depth: residual blocks of the trunk.
        feature_dim: channels of the penultimate map.
    """

    @register_to_config
    def __init__(
        self,
        shapes: tuple[str, ...] = (),
        colors: tuple[str, ...] = (),
        width: int = 64,
        depth: int = 4,
        feature_dim: int = 128,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width // 2, 4, stride=2, padding=1)
        self.down = nn.Conv2d(width // 2, width, 4, stride=2, padding=1)
        # Dilation 2 in every other block: the field of view then spans the image.
        self.blocks = nn.ModuleList(ResidualBlock(width, 1 + index % 2) for index in range(depth))
        self.norm = nn.GroupNorm(8, width)
        self.penultimate = nn.Conv2d(width, feature_dim, 3, padding=1)
        self.head = nn.Conv2d(feature_dim, 1 + len(shapes) + len(colors) + 4, 1)
        self.mask_up = nn.ConvTranspose2d(feature_dim, 16, 2, stride=2)
        self.mask_head = nn.Conv2d(16 + width // 2, 1, 3, padding=1)

    def forward(self, pixels: torch.Tensor) -> DetectorOutput:
        """Maps for float images [n, 3, H, W] in [-1, 1]; H and W multiples of 4."""
        shallow = F.silu(self.stem(pixels))
        hidden = self.down(shallow)
        for block in self.blocks:
            hidden = block(hidden)
        features = F.silu(self.penultimate(F.silu(self.norm(hidden))))
        maps = self.head(features).permute(0, 2, 3, 1).float()
        sizes = [1, len(self.config.shapes), len(self.config.colors), 4]
        objectness, shapes, colors, distances = maps.split(sizes, dim=-1)
        mask = self.mask_head(torch.cat([F.silu(self.mask_up(features)), shallow], dim=1))
        return DetectorOutput(
            objectness[..., 0],
            shapes,
            colors,
            F.softplus(distances) * BOX_SCALE,
            mask[:, 0].float(),
            features.float().mean(dim=(2, 3)),
        )

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features [n, feature_dim] of uint8 images [n, 3, H, W] or [n, H, W, 3].

        Raises:
            ValueError: not a uint8 batch of RGB images.
        """
        return self(self._pixels(images)).features

    @torch.no_grad()
    def detect(
        self, images: torch.Tensor, threshold: float = 0.05, max_overlap: float = 0.15
    ) -> list[ShapeDetections]:
        """Objects of uint8 images [n, H, W, 3] or [n, 3, H, W].

        Args:
            images: the batch.
            threshold: least score to keep.
            max_overlap: largest IoU of two kept boxes. Boxes of different ShapesWorld objects hardly touch; at
                0.4, 18 of 1,066 objects were found twice, at 0.15 none.

        Raises:
            ValueError: not a uint8 batch of RGB images, or sides that are not multiples of 4.
        """
        pixels = self._pixels(images)
        output = self(pixels)
        shape_probs = output.shapes.softmax(dim=-1)
        color_probs = output.colors.softmax(dim=-1)
        scores = output.objectness.sigmoid() * shape_probs.amax(dim=-1)
        boxes = _decode_boxes(output.distances)
        foreground = F.interpolate(output.mask[:, None], scale_factor=2.0, mode="bilinear")[:, 0] > 0
        results = []
        for index in range(len(pixels)):
            kept = scores[index] > threshold
            order = scores[index][kept].argsort(descending=True, stable=True)
            found = boxes[index][kept][order]
            chosen = _suppress(found, max_overlap)
            pick = order[chosen]
            probs = color_probs[index][kept][pick]
            results.append(
                ShapeDetections(
                    shape_probs[index][kept][pick].argmax(dim=-1),
                    probs.argmax(dim=-1),
                    probs,
                    scores[index][kept][pick],
                    found[chosen],
                    _masks(found[chosen], foreground[index]),
                )
            )
        return results

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        if images.ndim != 4 or images.dtype != torch.uint8 or 3 not in (images.shape[1], images.shape[3]):
            raise ValueError(f"images must be uint8 [n, H, W, 3] or [n, 3, H, W], got {images.dtype} {images.shape}")
        if images.shape[3] == 3:
            images = images.permute(0, 3, 1, 2)
        if images.shape[2] % STRIDE or images.shape[3] % STRIDE:
            raise ValueError(f"image sides must be multiples of {STRIDE}, got {tuple(images.shape[2:])}")
        return images.to(self.device, self.dtype).div(127.5).sub(1.0)


def cell_centres(height: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[h, w, 2]: x and y in pixels of the cell centres of a grid of h x w cells."""
    ys = (torch.arange(height, device=device) + 0.5) * STRIDE
    xs = (torch.arange(width, device=device) + 0.5) * STRIDE
    return torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)


def _decode_boxes(distances: torch.Tensor) -> torch.Tensor:
    """Distances [n, h, w, 4] from the cell centres -> boxes [n, h, w, 4] inside the image."""
    height, width = distances.shape[1:3]
    centres = cell_centres(height, width, distances.device)
    boxes = torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], dim=-1)
    limit = torch.tensor([width, height, width, height], device=distances.device) * STRIDE
    return torch.minimum(boxes.clamp(min=0), limit)


def pairwise_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union [n, m] of boxes [n, 4] and [m, 4]."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = (high - low).clamp(min=0).prod(dim=-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(dim=-1) for x in (a, b))
    return inter / (area_a[:, None] + area_b[None, :] - inter).clamp(min=1e-9)


def _suppress(boxes: torch.Tensor, max_overlap: float) -> torch.Tensor:
    """Indices of the boxes [n, 4] (best first) that no better kept box overlaps."""
    overlap = pairwise_iou(boxes, boxes) > max_overlap
    kept: list[int] = []
    alive = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    for index in range(len(boxes)):
        if alive[index]:
            kept.append(index)
            alive &= ~overlap[index]
    return torch.tensor(kept, dtype=torch.long, device=boxes.device)


def _masks(boxes: torch.Tensor, foreground: torch.Tensor) -> torch.Tensor:
    """Foreground pixels [H, W] inside each box, each pixel given to the nearest box centre: bool [n, H, W]."""
    height, width = foreground.shape
    ys = torch.arange(height, device=boxes.device)[None, :, None] + 0.5
    xs = torch.arange(width, device=boxes.device)[None, None, :] + 0.5
    x0, y0, x1, y1 = (boxes[:, k, None, None] for k in range(4))
    # One pixel of slack: the box edge is sub-pixel and the foreground's is not.
    inside = (xs > x0 - 1) & (xs < x1 + 1) & (ys > y0 - 1) & (ys < y1 + 1)
    if not len(boxes):
        return inside
    distance = (xs - (x0 + x1) / 2).square() + (ys - (y0 + y1) / 2).square()
    nearest = distance.masked_fill(~inside, float("inf")).argmin(dim=0)
    owner = nearest[None] == torch.arange(len(boxes), device=boxes.device)[:, None, None]
    return inside & owner & foreground[None]
