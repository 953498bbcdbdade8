"""Does the detector see anything at all? Asked before it may judge anybody.

A detector whose weights and configuration do not belong together, or whose operations run wrongly on a GPU, gives low
scores to everything and silently turns every image into a wrong one (geneval #6, #8, #15). So it must first find,
above 0.9, what is plain to see.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.detections import ObjectDetector
from fastgen.evaluation.images import MAX_FILE_BYTES, decode_image
from fastgen.io import read_limited

THRESHOLD = 0.9
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Photographs that scikit-image installs with itself -> what they show.
_SCIKIT = {"chelsea": "cat", "astronaut": "person", "coffee": "cup"}


@dataclass(frozen=True, slots=True, eq=False)
class Photo:
    """A picture, uint8 [H, W, 3], and a class that it certainly shows."""

    name: str
    expected: str
    image: np.ndarray


def scikit_photos() -> list[Photo]:
    """A cat, a person and a cup from scikit-image.

    Raises:
        FastgenError: it is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise FastgenError(
            "self-test: its photographs come with scikit-image, which is not installed: pip install scikit-image, "
            "or name a folder of your own with --self-test-photos (cat.jpg, fire_hydrant.png, ...), or do without "
            "with --no-self-test, which the result will say"
        ) from error
    return [Photo(name, expected, np.asarray(getattr(data, name)())) for name, expected in _SCIKIT.items()]


def folder_photos(folder: str | Path, class_names: Sequence[str]) -> list[Photo]:
    """The pictures of a folder; each file is named after what it shows, "_" for a space, and perhaps a number:
    cat.jpg, fire_hydrant-2.png.

    Raises:
        FastgenError: the folder has no picture, or one that cannot be read or is named after no class.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES) if folder.is_dir() else []
    if not files:
        raise FastgenError(f"self-test: {folder} has no photographs ({', '.join(_SUFFIXES)})")
    photos = []
    for path in files:
        expected = path.stem.split("-")[0].replace("_", " ").strip().lower()
        if expected not in class_names:
            raise FastgenError(f"self-test: {path}: {expected!r} is no class of the detector")
        data = read_limited(path, MAX_FILE_BYTES)
        photos.append(Photo(path.name, expected, decode_image(data, str(path), upright=True)))
    return photos


def rendered_photos() -> list[Photo]:
    """One ShapesWorld render of every shape, for the ShapesWorld detector."""
    import random

    from fastgen.data.scenes import COLORS, SHAPES, ObjectSpec, SceneSpec, sample_scene
    from fastgen.data.shapes import render

    photos = []
    for number, shape in enumerate(SHAPES):
        color = COLORS[number % len(COLORS)]
        scene = sample_scene(SceneSpec((ObjectSpec(shape, color),)), random.Random(number))
        images, _ = render([scene], [(1_000_081, number)])
        photos.append(Photo(f"{color} {shape}", shape, images[0]))
    return photos


def self_test(detector: ObjectDetector, photos: Iterable[Photo], threshold: float = THRESHOLD) -> dict[str, Any]:
    """Best score of what each photo shows.

    Returns:
        JSON-ready {"threshold", "photos": [{"name", "expected", "score"}]}

    Raises:
        FastgenError: one of them is not above the threshold; the line names the class that was detected instead.
    """
    rows: list[dict[str, Any]] = []
    for photo in photos:
        (found,) = detector.detect([photo.image])
        scores = [float(score) for label, score in zip(found.labels, found.scores, strict=True)
                  if label == photo.expected]  # fmt: skip
        rows.append({"name": photo.name, "expected": photo.expected, "score": max(scores, default=0.0)})
        if rows[-1]["score"] <= threshold:
            best = int(np.argmax(found.scores)) if len(found) else None
            seen = "nothing" if best is None else f"{found.labels[best]} at {found.scores[best]:.3f}"
            raise FastgenError(
                f"self-test: the detector must see a {photo.expected} in {photo.name} above {threshold}, it gave "
                f"{rows[-1]['score']:.3f} and saw {seen} at best; its scores of other images would be worth nothing"
            )
    return {"threshold": threshold, "photos": rows}
