"""The GenEval verdict on one image as a pure function of the detections, without weights or the image.

A front for :mod:`fastgen.evaluation.geneval.rules` for detections of any origin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastgen.evaluation.geneval.detections import Detections
from fastgen.evaluation.geneval.metadata import Metadata
from fastgen.evaluation.geneval.rules import evaluate_image


@dataclass(frozen=True, slots=True, eq=False)
class Detection:
    """One detected object.

    Attributes:
        class_name: by the name the metadata uses.
        box: (x1, y1, x2, y2) in pixels, x2 and y2 exclusive.
        score: confidence in [0, 1]. A `numpy.float32` is compared with the thresholds in single precision, as the
            official scorer does; give all scores of an image in one type.
        mask: bool [H, W] of the image, or None; only a colour classifier uses it.
    """

    class_name: str
    box: Sequence[float]
    score: float
    mask: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether an image is correct, and every broken demand, one per line ("" when correct)."""

    correct: bool
    reason: str


ClassifyColor = Callable[[str, Sequence[Detection]], Sequence[str]]
"""(class name, detections of it) -> colour name of each."""


def judge(
    detections: Sequence[Detection],
    metadata: Metadata | Mapping[str, Any],
    classify_color: ClassifyColor | None = None,
) -> Judgement:
    """Judges one image by its detections, by the rules of the official GenEval scorer.

    Args:
        detections: everything the detector saw, of every class, unfiltered, in any order.
        metadata: what the image should contain; a mapping is one parsed line of a metadata file.
        classify_color: called only for clauses that demand a colour and whose count is met, with their `count` best
            detections, best first.

    Raises:
        ValueError: the metadata or a detection is malformed, or a colour is required without a colour classifier.
    """
    wanted = metadata if isinstance(metadata, Metadata) else Metadata.from_dict(metadata)
    everything = Detections(
        labels=tuple(item.class_name for item in detections),
        scores=np.asarray([item.score for item in detections]),
        boxes=np.asarray([item.box for item in detections]),
    )

    def name_colors(_: Detections, class_name: str, indices: Sequence[int]) -> Sequence[str]:
        if classify_color is None:
            raise ValueError(f"classify_color: the metadata demands a colour of {class_name!r}, so it is needed")
        return classify_color(class_name, [detections[index] for index in indices])

    result = evaluate_image(wanted, everything, name_colors)
    return Judgement(result.correct, result.reason)
