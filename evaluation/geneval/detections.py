"""What a detector reports to the GenEval rules, and the protocols of detectors and colour classifiers.

The rules (:mod:`fastgen.evaluation.geneval.rules`) see only :class:`Detections`, so the same decision code judges
Mask2Former + CLIP on photographs and the small ShapesWorld detector, which also detects colours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

_SCORE_SLACK = 1e-6  # a product of float32 probabilities may exceed 1 by rounding


def _floating(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """`value` as a floating array. float32 and float64 are kept: the strict thresholds compare in that precision."""
    array = np.asarray(value)
    if array.dtype == np.bool_ or not (np.issubdtype(array.dtype, np.number) or array.size == 0):
        raise ValueError(f"Detections.{name}: needs numbers, got dtype {array.dtype}")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"Detections.{name}: contains NaN or infinite values")
    if shape[0] == 0 and array.size == 0:  # of nothing, whatever its other sides
        array = array.reshape(shape)
    if array.shape != shape:
        raise ValueError(f"Detections.{name}: needs shape {shape} for {shape[0]} labels, got {array.shape}")
    return array


def _shares(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Such an array, of values between 0 and 1."""
    array = _floating(name, value, shape)
    if array.size and not (array.min() >= 0 and array.max() <= 1 + _SCORE_SLACK):
        raise ValueError(f"Detections.{name}: needs values in [0, 1]")
    return array


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """All detections of one image, of every class, in no particular order.

    A detector may list one region under several classes; each entry is judged on its own.

    Attributes:
        labels: class name of each detection, length n.
        scores: confidence in [0, 1], float32 or float64 [n].
        boxes: (x1, y1, x2, y2) in pixels of the judged image, x2 and y2 exclusive, float [n, 4].
        masks: bool [n, H, W] at the size of the judged image, or None.
        color_names: palette of `color_probs`, length c, or None.
        color_probs: probability of each palette colour, float [n, c], or None.

    Raises:
        ValueError: lengths, shapes or dtypes disagree, a value is not finite, a box has x2 < x1 or y2 < y1,
            or a score or probability is outside [0, 1].
    """

    labels: tuple[str, ...]
    scores: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray | None = None
    color_names: tuple[str, ...] | None = None
    color_probs: np.ndarray | None = None

    def __post_init__(self) -> None:
        labels: Any = self.labels
        if isinstance(labels, str) or not all(isinstance(label, str) and label for label in labels):
            raise ValueError("Detections.labels: needs a sequence of non-empty class names")
        n = len(labels)
        # Frozen: these writes only bring the arrays into their types.
        put = functools.partial(object.__setattr__, self)
        put("labels", tuple(labels))
        put("scores", _shares("scores", self.scores, (n,)))
        put("boxes", _floating("boxes", self.boxes, (n, 4)))
        if (self.boxes[:, 2:] < self.boxes[:, :2]).any():
            raise ValueError("Detections.boxes: needs x1 <= x2 and y1 <= y2 (xyxy)")
        if self.masks is not None:
            put("masks", np.asarray(self.masks))
            if self.masks.dtype != np.bool_ or self.masks.ndim != 3 or self.masks.shape[0] != n:
                raise ValueError(
                    f"Detections.masks: needs bool [{n}, H, W], got {self.masks.dtype} {self.masks.shape}"
                )
        if (self.color_names is None) != (self.color_probs is None):
            raise ValueError("Detections: color_names and color_probs come together or not at all")
        if self.color_names is not None:
            put("color_names", tuple(self.color_names))
            put("color_probs", _shares("color_probs", self.color_probs, (n, len(self.color_names))))

    def __len__(self) -> int:
        return len(self.labels)

    def colors(self) -> list[str]:
        """Most probable colour name of each detection.

        Raises:
            ValueError: the detections carry no colours.
        """
        if self.color_names is None or self.color_probs is None:
            raise ValueError("these detections carry no colours: a ColorClassifier is needed")
        return [self.color_names[int(best)] for best in self.color_probs.argmax(axis=1)] if len(self) else []


@runtime_checkable
class ObjectDetector(Protocol):
    """Finds objects of a closed set of classes."""

    @property
    def class_names(self) -> Sequence[str]:
        """Every class this detector can report, by the names the metadata uses."""
        ...

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detections of each image (uint8 [H, W, 3], RGB; sizes may differ), in the pixels of that image."""
        ...


@runtime_checkable
class ColorClassifier(Protocol):
    """Names the colour of detected objects."""

    def classify(
        self, image: np.ndarray, detections: Detections, class_name: str, indices: Sequence[int]
    ) -> list[str]:
        """Colour name of each detection in `indices` (into `detections`) of `image` (uint8 [H, W, 3])."""
        ...


def check_image(image: Any, name: str = "image") -> np.ndarray:
    """`image` as uint8 [H, W, 3] with H, W >= 1, or ValueError naming what it is."""
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f"{name}: needs a non-empty uint8 [H, W, 3] RGB array, got {array.dtype} {array.shape}")
    return array
