"""The ShapesWorld checker: the small detector behind the `ObjectDetector` and `ColorClassifier` protocols.

The GenEval rules on top of it give ShapesWorld-GenEval. Scores are named so everywhere: the checker knows eight shapes
in eight colours, and its numbers say nothing about photographs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fastgen.data.shapes import COLORS, IMAGE_SIZE, SHAPES
from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.detections import Detections, check_image
from fastgen.pretrained import load_pretrained


class ShapesModel(Protocol):
    """The interface of a detector network for the checker; `fastgen.models.shapes_detector.ShapesDetector` is one."""

    def detect(self, images: torch.Tensor) -> Sequence[Any]:
        """uint8 [n, 64, 64, 3] -> per image an object with the tensors labels, color_probs, scores, boxes (exclusive
        xyxy) and masks, as `ShapeDetections`."""
        ...

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 64, 64, 3] -> float [n, d] penultimate features."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...


def load_detector(folder: str | Path | None = None, *, device: str | torch.device = "cpu") -> ShapesModel:
    """The embedded detector, or the one saved in `folder`, in evaluation mode.

    Raises:
        FastgenError: the folder does not exist, does not contain a whole detector, or contains one of other classes.
    """
    from fastgen.models.shapes_detector import ShapesDetector
    from fastgen.pipelines.loading.checkpoint import embedded_folder

    folder = embedded_folder("shapes-detector") if folder is None else Path(folder)
    if not (folder / "config.json").is_file():
        raise FastgenError(f"{folder}: has no ShapesWorld detector (no config.json)")
    try:
        model, info = load_pretrained(ShapesDetector, str(folder), local_files_only=True, output_loading_info=True)
    except Exception as error:  # safetensors, json and torch each raise their own type for a damaged file
        raise FastgenError(f"{folder}: cannot load the ShapesWorld detector: {str(error).splitlines()[0]}") from error
    if info["missing_keys"]:
        # diffusers only warns here, and the judge would run on random weights.
        raise FastgenError(f"{folder}: the ShapesWorld detector lacks the weights {', '.join(info['missing_keys'])}")
    if (tuple(model.config.shapes), tuple(model.config.colors)) != (SHAPES, COLORS):
        raise FastgenError(f"{folder}: the detector knows other shapes or colours than ShapesWorld has")
    return model.to(device).eval()


def fingerprint(model: ShapesModel | torch.nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of the weights: equal weights give equal features."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def to_model_size(images: torch.Tensor) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> uint8 [n, 64, 64, 3], bilinear with antialiasing; 64x64 images pass unchanged.

    The resize is direct, so a picture that is not square is judged squeezed.
    """
    if images.shape[1:3] == (IMAGE_SIZE, IMAGE_SIZE):
        return images
    small = torch.nn.functional.interpolate(
        images.permute(0, 3, 1, 2).float(), size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True
    )
    return small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def model_batch(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Images uint8 [H, W, 3] of any sizes as uint8 [n, 64, 64, 3]."""
    # Copied, since a decoded picture is often read-only and torch has no such tensors.
    return torch.cat([to_model_size(torch.from_numpy(np.array(image))[None]) for image in images])


class ShapesChecker:
    """Detector and colour classifier of ShapesWorld.

    Args:
        model: the network; the embedded one when None.
        device: where it runs.
        batch_size: images in one forward pass; the result does not depend on it.
    """

    name = "shapes-detector"
    class_names: tuple[str, ...] = SHAPES
    color_names: tuple[str, ...] = COLORS

    def __init__(
        self, model: ShapesModel | None = None, *, device: str | torch.device = "cpu", batch_size: int = 64
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: needs an integer >= 1, got {batch_size}")
        self.model = load_detector(device=device) if model is None else model
        self.device = torch.device(device)
        self.batch_size = batch_size

    @torch.no_grad()
    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detections of each image (uint8 [H, W, 3], any sizes), boxes and masks in the pixels of that image.

        Raises:
            ValueError: an image is not uint8 RGB.
        """
        checked = [check_image(image, f"images[{i}]") for i, image in enumerate(images)]
        out: list[Detections] = []
        for first in range(0, len(checked), self.batch_size):
            part = checked[first : first + self.batch_size]
            found = self.model.detect(model_batch(part).to(self.device))
            out += [_detections(raw, image.shape[:2]) for raw, image in zip(found, part, strict=True)]
        return out

    def classify(
        self, image: np.ndarray, detections: Detections, class_name: str, indices: Sequence[int]
    ) -> list[str]:
        """Colours of the objects `indices`: the detector has named them already."""
        colors = detections.colors()
        return [colors[index] for index in indices]


def _detections(raw: Any, size: tuple[int, int]) -> Detections:
    """Detections of one image from the network's output at 64x64, scaled to `size` (H, W)."""
    height, width = size
    scale = np.array([width, height, width, height], dtype=np.float64) / IMAGE_SIZE
    masks = raw.masks.cpu().numpy()
    if size != (IMAGE_SIZE, IMAGE_SIZE):
        rows = (np.arange(height) * 2 + 1) * IMAGE_SIZE // (2 * height)  # the source pixel under each centre
        columns = (np.arange(width) * 2 + 1) * IMAGE_SIZE // (2 * width)
        masks = masks[:, rows][:, :, columns]
    return Detections(
        labels=tuple(SHAPES[label] for label in raw.labels.tolist()),
        scores=raw.scores.cpu().numpy(),
        boxes=raw.boxes.double().cpu().numpy().reshape(-1, 4) * scale,
        masks=masks,
        color_names=COLORS,
        color_probs=raw.color_probs.cpu().numpy().reshape(-1, len(COLORS)),
    )
