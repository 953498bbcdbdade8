"""The GenEval decision rules in pure numpy: what makes one image correct.

Equal to the official scorer in every corner the specification lists: strict score thresholds (0.3, and 0.9 for
counting), at most 16 detections a class, no NMS, the `count` best detections of a clause, positions judged by an
offset that is shortened by a tenth of both boxes but normalised by the full distance. No weights, no images.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fastgen.evaluation.geneval.detections import Detections
from fastgen.evaluation.geneval.metadata import Clause, Metadata

ColorFn = Callable[[Detections, str, Sequence[int]], Sequence[str]]
"""(detections, class name, indices) -> colour name of each index; a ColorClassifier bound to its image."""

COUNTING_TAG = "counting"
#: Detections count when their score is strictly above it; the second is that of the task "counting".
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
_MOST_OBJECTS = 16  # of a class


@dataclass(frozen=True, slots=True)
class ImageResult:
    """Verdict on one image.

    Attributes:
        tag: task of the prompt.
        prompt_id: names the prompt; images with one prompt_id are one cluster in the standard errors.
        correct: all clauses are true.
        reasons: every broken demand, empty when correct.
        details: class name -> [[x1, y1, x2, y2, score], ...], the kept detections, best first.
    """

    tag: str
    prompt_id: int | str
    correct: bool
    reasons: tuple[str, ...] = ()
    details: dict[str, list[list[float]]] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """All reasons in one text, a line each, as the official results file contains them."""
        return "\n".join(self.reasons)


def keep_detections(detections: Detections, threshold: float) -> dict[str, list[int]]:
    """Indices of the detections that count, per class, best first; of equal scores the last listed comes first.

    That is the order of the official ``numpy.argsort(scores)[::-1]`` with a stable sort. NumPy's default sort is
    stable on some processors only, and verdicts must not depend on the processor.

    The comparison runs in the precision of the scores, as the official one does: a float32 score of 0.3 is not above
    the threshold 0.3, although as a double it would be.
    """
    kept: dict[str, list[int]] = {}
    order = np.argsort(detections.scores, kind="stable")[::-1]
    for index in order[detections.scores[order] > threshold].tolist():
        kept.setdefault(detections.labels[index], []).append(index)
    return {label: indices[:_MOST_OBJECTS] for label, indices in kept.items()}


def relations(box_a: np.ndarray, box_b: np.ndarray, margin: float = 0.1) -> tuple[str, ...]:
    """The position of box_a relative to box_b: none, one or two of "left of", "right of", "above", "below".

    Per axis the distance of the centres is shortened by `margin` times both box sizes, but the direction divides by
    the full (un-shortened) distance; so the same angle reads as a relation for small boxes and as none for big ones.
    """
    a, b = np.reshape(box_a, (2, 2)), np.reshape(box_b, (2, 2))  # [corner, axis]
    offset = a.mean(axis=0) - b.mean(axis=0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    revised = np.maximum(np.abs(offset) - margin * sizes, 0) * np.sign(offset)
    if (np.abs(revised) < 1e-3).all():
        return ()
    dx, dy = revised / np.linalg.norm(offset)
    found = (("left of", dx < -0.5), ("right of", dx > 0.5), ("above", dy < -0.5), ("below", dy > 0.5))
    return tuple(name for name, holds in found if holds)


def evaluate_image(
    metadata: Metadata,
    detections: Detections,
    classify_color: ColorFn | None = None,
    *,
    prompt_id: int | str | None = None,
) -> ImageResult:
    """Judges one image by its detections.

    Args:
        metadata: what the image should contain.
        detections: everything the detector saw, unfiltered.
        classify_color: names colours; None takes them from the detections. Called only for clauses with a colour
            whose count is met, with the `count` best detections.
        prompt_id: identity of the prompt for clustering; the prompt text when None.

    Raises:
        ValueError: a colour is demanded, but neither `classify_color` nor the detections can name one.
    """
    kept = keep_detections(detections, COUNTING_THRESHOLD if metadata.tag == COUNTING_TAG else THRESHOLD)
    reasons: list[str] = []
    matched: list[list[int] | None] = []  # per include clause: its objects, or None when it failed
    for clause in metadata.include:
        problems, found = _judge_clause(clause, kept, matched, detections, classify_color)
        matched.append(None if problems else found)
        reasons += problems
    for clause in metadata.exclude:
        count = len(kept.get(clause.class_name, ()))
        if count >= clause.count:
            reasons.append(f"expected {clause.class_name}<{clause.count}, found {count}")
    return ImageResult(
        tag=metadata.tag,
        prompt_id=metadata.prompt if prompt_id is None else prompt_id,
        correct=not reasons,
        reasons=tuple(reasons),
        details={
            label: [[*map(float, detections.boxes[i]), float(detections.scores[i])] for i in indices]
            for label, indices in kept.items()
        },
    )


def _judge_clause(
    clause: Clause,
    kept: dict[str, list[int]],
    matched: Sequence[list[int] | None],
    detections: Detections,
    classify_color: ColorFn | None,
) -> tuple[list[str], list[int]]:
    """(broken demands, the objects of the clause); position is read only when count and colour are right."""
    name = clause.class_name
    found = kept.get(name, [])[: clause.count]
    if len(found) < clause.count:
        return [f"expected {name}>={clause.count}, found {len(found)}"], found
    if clause.color is not None:
        colors = Counter(_colors(detections, name, found, classify_color))
        if colors[clause.color] < clause.count:
            seen = ", ".join(f"{count} {color}" for color, count in sorted(colors.items()))
            return [f"expected {clause.color} {name}>={clause.count}, found {seen}"], found
    if clause.position is None:
        return [], found
    wanted, target = clause.position
    others = matched[target]
    if others is None:
        return [f"no target for {name} to be {wanted}"], found
    problems = []
    for index in found:
        for other in others:
            held = relations(detections.boxes[index], detections.boxes[other])
            if wanted not in held:
                seen = " and ".join(held) or "no relation to"
                problems.append(f"expected {name} {wanted} target, found {seen} target")
    return problems, found


def _colors(
    detections: Detections, class_name: str, indices: Sequence[int], classify_color: ColorFn | None
) -> Sequence[str]:
    if classify_color is None:
        colors = detections.colors()
        return [colors[i] for i in indices]
    named = classify_color(detections, class_name, indices)
    if len(named) != len(indices):
        raise ValueError(f"classify_color: needs one colour per object ({len(indices)}), got {len(named)}")
    return named


# --- summary -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Score of one task.

    Attributes:
        score: mean of `correct` over the images of the task, in [0, 1].
        stderr: standard error of `score`, clustered by prompt; None with fewer than two prompts.
        n_images, n_prompts: what the mean runs over.
    """

    score: float
    stderr: float | None
    n_images: int
    n_prompts: int


@dataclass(frozen=True, slots=True)
class Summary:
    """Scores of a set of images, all in [0, 1].

    Attributes:
        tasks: per tag, in order of first appearance.
        overall: unweighted mean of the task scores.
        overall_stderr: its standard error; None when a task has none.
        correct_images: share of correct images (weighted by task size, unlike `overall`).
        correct_prompts: share of prompts with at least one correct image.
    """

    tasks: dict[str, TaskScore]
    overall: float
    overall_stderr: float | None
    correct_images: float
    correct_prompts: float
    n_images: int
    n_prompts: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready dict."""
        return asdict(self)


def summarize(results: Sequence[ImageResult]) -> Summary:
    """Task scores, their unweighted mean, and standard errors.

    Images of one prompt succeed and fail together, so counting them as independent would promise too much. The
    standard error takes the prompt as the sampling unit (clusters, the ratio estimator of a mean): with n_p images
    and k_p correct ones for prompt p of P, score s = sum k / sum n and

        stderr^2 = P / (P - 1) * sum_p (k_p - s n_p)^2 / (sum_p n_p)^2,

    which for equal n_p is the plain standard error of the P prompt means. Tasks share no prompt, so the overall
    variance is the sum of the task variances over the squared number of tasks.

    Raises:
        ValueError: no results, or one prompt_id under two tags.
    """
    if not results:
        raise ValueError("results: no image was scored")
    prompts: dict[int | str, tuple[str, list[bool]]] = {}
    for result in results:
        tag, correct = prompts.setdefault(result.prompt_id, (result.tag, []))
        if tag != result.tag:
            raise ValueError(f"prompt {result.prompt_id!r} appears under two tasks, {tag!r} and {result.tag!r}")
        correct.append(result.correct)
    by_tag: dict[str, list[list[bool]]] = {}
    for tag, correct in prompts.values():
        by_tag.setdefault(tag, []).append(correct)
    tasks = {tag: _task_score(groups) for tag, groups in by_tag.items()}
    errors = [task.stderr for task in tasks.values()]
    known = [error for error in errors if error is not None]
    return Summary(
        tasks=tasks,
        overall=sum(task.score for task in tasks.values()) / len(tasks),
        overall_stderr=math.sqrt(sum(e * e for e in known)) / len(tasks) if len(known) == len(errors) else None,
        correct_images=sum(result.correct for result in results) / len(results),
        correct_prompts=sum(any(correct) for _, correct in prompts.values()) / len(prompts),
        n_images=len(results),
        n_prompts=len(prompts),
    )


def clustered_error(correct: Sequence[int], images: Sequence[int]) -> float | None:
    """The standard error of `summarize` from every prompt's correct images and images; None for fewer than two."""
    if len(images) < 2:
        return None
    hits, sizes = np.array(correct, dtype=np.float64), np.array(images, dtype=np.float64)
    n, total = len(sizes), sizes.sum()
    return float(np.sqrt(n / (n - 1) * ((hits - hits.sum() / total * sizes) ** 2).sum()) / total)


def _task_score(groups: Sequence[Sequence[bool]]) -> TaskScore:
    hits, sizes = [sum(group) for group in groups], [len(group) for group in groups]
    return TaskScore(sum(hits) / sum(sizes), clustered_error(hits, sizes), sum(sizes), len(groups))
