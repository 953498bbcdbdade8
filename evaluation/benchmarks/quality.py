"""Scores of one row of a quality benchmark: the evaluation set drawn into a folder, resumable, and judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fastgen.evaluation.compare import paired_errors
from fastgen.evaluation.geneval.metadata import Metadata
from fastgen.evaluation.geneval.shapes_checker import ShapesModel
from fastgen.evaluation.measures import OVERALL
from fastgen.evaluation.runner import EvaluationRun, RunSettings
from fastgen.evaluation.shapesworld import score_folder
from fastgen.evaluation.verifiers.base import Verifier, picture_scores

__all__ = ["paired_difference", "score_row"]

Draw = Callable[[list[str], list[int]], Iterator[Image.Image]]


def score_row(
    folder: Path,
    prompts: Sequence[Metadata],
    settings: RunSettings,
    draw: Draw,
    detector: ShapesModel,
    verifier: Verifier | None = None,
) -> dict[str, Any]:
    """Draw the missing pictures in the row's folder below `folder`, and score them.

    Args:
        folder: of all rows.
        prompts: the evaluation set.
        settings: of the run; its model is the row's name.
        draw: pictures of prompts and seeds, one after the other.
        detector: judges them.
        verifier: scores the pictures as well.

    Returns:
        "score", "stderr", "tasks" and "fd" (ShapesWorld-GenEval and FD-shapes), "detector", and with a verifier
        "verifier", its mean score. "prompts" lists each prompt's correct pictures, for paired comparisons.
    """
    place = folder / settings.model.replace(" ", "-")
    EvaluationRun(place, list(prompts), settings).generate(draw)
    scored = score_folder(place, detector, device=settings.device)
    scores = scored.data
    judged: dict[str, float] = {}
    if verifier is not None:
        asked = [sample.metadata.prompt for sample in scored.samples]
        found = picture_scores(verifier, (sample.load() for sample in scored.samples), asked)
        judged["verifier"] = float(found.mean())
    return {
        "score": scores["overall"],
        "stderr": scores["overall_stderr"],
        "tasks": {tag: task["score"] for tag, task in scores["tasks"].items()},
        "fd": scores["fd_shapes"]["value"],
        "detector": scores["detector"],
        "prompts": scores["prompts"],
        **judged,
    }


def paired_difference(base: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The difference of the scores of two results of `score_row` and its 95 % interval, by prompts as pairs; None
    where a task has too few prompts."""
    errors = paired_errors(dict(base), dict(row))
    if not errors:
        return None
    difference, reach = row["score"] - base["score"], 1.96 * errors[OVERALL]
    return {"difference": difference, "ci": [difference - reach, difference + reach]}
