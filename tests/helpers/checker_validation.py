"""How far the ShapesWorld checker can be trusted: object-level accuracy on renders whose truth is known.

`DEFINITIONS` says what each number means and goes into every result. After training another checker,

    python tests/helpers/checker_validation.py docs/results/shapes-checker.json

writes the numbers, and their table next to them as .md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.data.distractors import with_distractors
from fastgen.data.shapes import ShapesBatch, ShapesWorld
from fastgen.environment import environment
from fastgen.evaluation.geneval.detections import Detections, ObjectDetector
from fastgen.evaluation.geneval.rules import COUNTING_THRESHOLD, THRESHOLD
from fastgen.evaluation.geneval.shapes_checker import ShapesChecker, fingerprint, load_detector
from fastgen.evaluation.report import markdown_table, percent, provenance
from fastgen.evaluation.verifiers.agreement import calibration_error
from fastgen.io import atomic_write_bytes, atomic_write_json

VALIDATION_SEED = 1_000_033  # never a training seed: recipes use small ones
MIN_IOU = 0.5
THRESHOLDS = (THRESHOLD, COUNTING_THRESHOLD)
TARGET = 0.99
"""Object-level accuracy on clean renders at the 0.3 threshold below which the checker must not judge anybody."""

DEFINITIONS = (
    "A detection counts when its score is strictly above the threshold of the rules, 0.3 or (counting) 0.9. It is "
    "correct when it can be paired with a true object of the same class and the same colour at box IoU >= 0.5, each "
    "object paired once, better scores first; every other counted detection is spurious. Accuracy = correct / (true "
    "objects + spurious detections), so a wrong class or colour costs twice, as a missed object and as a spurious "
    "one. Precision = correct / counted detections, recall = correct / true objects, both at 0.3. Mean confidence = "
    "mean score of the detections counted at 0.3. ECE = expected calibration error over them: 15 equal bins of the "
    "score, mean |share correct - mean score| weighted by bin size."
)

_CHUNK = 256  # images rendered and checked at once

Perturb = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True, slots=True)
class TrueObject:
    """One rendered object: class, colour and its box (x1, y1, x2, y2), x2 and y2 exclusive, in pixels."""

    label: str
    color: str
    box: tuple[int, int, int, int]


def true_objects(batch: ShapesBatch, index: int) -> list[TrueObject]:
    """The objects of image `index` of `batch`, boxes tight around their pixels."""
    out = []
    for slot, item in enumerate(batch.scenes[index]):
        rows, columns = np.nonzero(batch.instances[index] == slot + 1)
        box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        out.append(TrueObject(item.shape, item.color, box))
    return out


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU of two xyxy boxes with exclusive far edges."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return float(shared / union) if union > 0 else 0.0


def match(truth: Sequence[TrueObject], detections: Detections, threshold: float) -> list[tuple[float, bool]]:
    """(score, correct) of every detection that counts at `threshold`, best first."""
    free = list(truth)
    colors = detections.colors()
    out = []
    order = np.argsort(-detections.scores, kind="stable")
    for index in order[detections.scores[order] > threshold].tolist():
        fits = [item for item in free if (item.label, item.color) == (detections.labels[index], colors[index])]
        best = max(fits, key=lambda item: box_iou(item.box, detections.boxes[index]), default=None)
        correct = best is not None and box_iou(best.box, detections.boxes[index]) >= MIN_IOU
        if correct and best is not None:
            free.remove(best)
        out.append((float(detections.scores[index]), correct))
    return out


def measure(truths: Sequence[Sequence[TrueObject]], detections: Sequence[Detections]) -> dict[str, Any]:
    """Every number of one table row.

    Returns:
        {"objects": true objects, "mean_confidence", "ece": at the 0.3 threshold or None without detections,
        "0.3" and "0.9": {"accuracy", "precision", "recall", "correct", "missed", "spurious"}}
    """
    objects = sum(len(truth) for truth in truths)
    row: dict[str, Any] = {"images": len(truths), "objects": objects}
    for threshold in THRESHOLDS:
        scored = [
            pair for truth, seen in zip(truths, detections, strict=True) for pair in match(truth, seen, threshold)
        ]
        correct = sum(hit for _, hit in scored)
        spurious = len(scored) - correct
        row[str(threshold)] = {
            "accuracy": correct / (objects + spurious) if objects + spurious else None,
            "precision": correct / len(scored) if scored else None,
            "recall": correct / objects if objects else None,
            "correct": correct,
            "missed": objects - correct,
            "spurious": spurious,
        }
        if threshold == THRESHOLDS[0]:
            row["mean_confidence"] = sum(score for score, _ in scored) / len(scored) if scored else None
            row["ece"] = calibration_error(scored)
    return row


# --- perturbations: uint8 [n, 64, 64, 3] -> the same ---------------------------------------------------------------


def blur(sigma: float) -> Perturb:
    """Gaussian blur, `sigma` in pixels."""
    from scipy.ndimage import gaussian_filter

    def apply(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return _to_uint8(gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0)))

    return apply


def noise(std: float) -> Perturb:
    """Independent Gaussian noise on every value, `std` as a share of the full range."""

    def apply(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return _to_uint8(images + rng.standard_normal(images.shape, dtype=np.float32) * np.float32(255 * std))

    return apply


def hue(degrees: float) -> Perturb:
    """Rotation of RGB about the grey axis."""
    angle = math.radians(degrees)
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    matrix = (math.cos(angle) * (np.eye(3) - axis) + math.sin(angle) * cross + axis).astype(np.float32)
    return lambda images, rng: _to_uint8(images.astype(np.float32) @ matrix.T)


def gain(factor: float) -> Perturb:
    """Brightness times `factor`."""
    return lambda images, rng: _to_uint8(images * np.float32(factor))


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


LEVELS: dict[str, tuple[str, Callable[[float], Perturb], tuple[float, ...]]] = {
    "blur": ("sigma, pixels", blur, (0.5, 1.0, 1.5, 2.0)),
    "noise": ("standard deviation, share of full range", noise, (0.02, 0.05, 0.1, 0.2)),
    "hue": ("rotation about the grey axis, degrees", hue, (-20.0, -10.0, 10.0, 20.0)),
    "gain": ("brightness factor", gain, (0.6, 0.8, 1.2, 1.4)),
}
"""name -> (unit, maker, levels)."""


def distractor_detections(checker: ObjectDetector, n: int, seed: int) -> dict[str, Any]:
    """How often `checker` finds an object that does not exist: in `n` pictures of blobs and textures.

    Returns:
        {"images": n, "0.3" and "0.9": share of the pictures with at least one detection above that score}
    """
    found = []
    for start in range(0, n, _CHUNK):
        batch = ShapesWorld(seed, held_out=False).batch(min(_CHUNK, n - start), start)
        distracted = with_distractors(batch, np.random.default_rng((seed, start)), empty=1.0, mixed=0.0)
        found += checker.detect(list(distracted.images))
    shares = {str(limit): sum(bool((seen.scores > limit).any()) for seen in found) / n for limit in THRESHOLDS}
    return {"images": n, **shares}


def validate_checker(
    checker: ObjectDetector,
    n: int = 2000,
    *,
    seed: int = VALIDATION_SEED,
    n_perturbed: int | None = None,
) -> dict[str, Any]:
    """Accuracy of `checker` on renders of every colour x shape pair, clean and under perturbations.

    Args:
        n: clean images, >= 1.
        seed: ShapesWorld seed; the default is no training seed.
        n_perturbed: images at each perturbation level, the first of the clean ones; min(n, 500) when None.

    Returns:
        JSON-ready dict: {"kind", "definitions", "seed", "clean": row, "rows": [row + perturbation, unit, level],
        "distractors": see `distractor_detections` (n_perturbed pictures), "target", "passed"}; rows as `measure`
        gives them.

    Raises:
        ValueError: n or n_perturbed is below 1, or n_perturbed above n.
    """
    few = min(n, 500) if n_perturbed is None else n_perturbed
    if n < 1 or not 1 <= few <= n:
        raise ValueError(f"n: needs 1 <= n_perturbed <= n, got n={n}, n_perturbed={few}")
    plan: list[tuple[str, str, float, Perturb]] = [
        (name, unit, level, make(level)) for name, (unit, make, levels) in LEVELS.items() for level in levels
    ]
    world = ShapesWorld(seed, held_out=False)
    truths: list[list[TrueObject]] = []
    clean: list[Detections] = []
    perturbed: list[list[Detections]] = [[] for _ in plan]
    for start in range(0, n, _CHUNK):
        batch = world.batch(min(_CHUNK, n - start), start)
        truths += [true_objects(batch, index) for index in range(len(batch.scenes))]
        clean += checker.detect(list(batch.images))
        images = batch.images[: max(few - start, 0)]
        for row, (_, _, _, perturb) in enumerate(plan):
            if len(images):
                changed = perturb(images, np.random.default_rng((seed, start, row)))
                perturbed[row] += checker.detect(list(changed))
    first = measure(truths, clean)
    return {
        "kind": "shapesworld-checker",
        "definitions": DEFINITIONS,
        "seed": seed,
        "clean": first,
        "rows": [
            {"perturbation": name, "unit": unit, "level": level, **measure(truths[:few], found)}
            for (name, unit, level, _), found in zip(plan, perturbed, strict=True)
        ],
        "distractors": distractor_detections(checker, few, seed),
        "target": TARGET,
        "passed": first["0.3"]["accuracy"] is not None and first["0.3"]["accuracy"] >= TARGET,
    }


def checker_markdown(data: dict[str, Any]) -> str:
    """The validation of the ShapesWorld checker (`validate_checker`) as a Markdown page."""
    clean = data["clean"]
    columns = ["images", "accuracy @0.3", "precision", "recall", "accuracy @0.9", "mean confidence", "ECE"]
    rows = [["none", *_checker_cells(clean)]]
    for row in data["rows"]:
        rows.append([f"{row['perturbation']} {row['level']:g} ({row['unit']})", *_checker_cells(row)])
    verdict = "reached" if data["passed"] else "MISSED"
    return (
        "# ShapesWorld checker\n\n"
        f"Object-level accuracy on {clean['images']} fresh renders with {clean['objects']} objects "
        f"(ShapesWorld seed {data['seed']}, all colour x shape pairs): **{percent(clean['0.3']['accuracy'], 2)} %** "
        f"at the 0.3 threshold, {percent(clean['0.9']['accuracy'], 2)} % at the 0.9 threshold of counting; "
        f"target {percent(data['target'], 0)} %: {verdict}.\n\n"
        + f"In {data['distractors']['images']} pictures of blobs and textures without any object it finds one in "
        f"{percent(data['distractors']['0.3'])} % at the 0.3 threshold, in {percent(data['distractors']['0.9'])} % at "
        "0.9.\n\n"
        + markdown_table(["perturbation", *columns], rows)
        + f"\nAll numbers in percent. {data['definitions']}\n"
        + "\n"
        + provenance(data)
        + "\n"
    )


def _checker_cells(row: dict[str, Any]) -> list[str]:
    low, high = row["0.3"], row["0.9"]
    shares = (low["accuracy"], low["precision"], low["recall"], high["accuracy"], row["mean_confidence"], row["ece"])
    return [str(row["images"]), *(percent(share, 2) for share in shares)]


def write_validation(path: Path, n: int = 2000, n_perturbed: int | None = None) -> None:
    """Validate the embedded checker, and write the result as JSON and its table as Markdown."""
    detector = load_detector()
    data = validate_checker(ShapesChecker(detector), n, n_perturbed=n_perturbed)
    data |= {"detector": fingerprint(detector), "environment": environment()}
    atomic_write_json(path, data)
    atomic_write_bytes(path.with_suffix(".md"), checker_markdown(data).encode())


if __name__ == "__main__":
    write_validation(Path(sys.argv[1]))
