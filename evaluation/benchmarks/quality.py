"""Scores of one row of a quality benchmark: the evaluation set drawn into a folder, resumable, and judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fastgen.evaluation.geneval.metadata import Metadata
from fastgen.evaluation.geneval.shapes import ShapesModel
from fastgen.evaluation.runner import EvaluationRun, RunSettings
from fastgen.evaluation.shapesworld import score_folder

__all__ = ["score_row"]

Draw = Callable[[list[str], list[int]], Iterator[Image.Image]]


def score_row(
    folder: Path, prompts: Sequence[Metadata], settings: RunSettings, draw: Draw, detector: ShapesModel
) -> dict[str, Any]:
    """Draw what is missing in the row's own folder below `folder`, and score it.

    Args:
        folder: of all rows.
        prompts: the evaluation set.
        settings: of the run; its model is the row's name.
        draw: pictures of prompts and seeds, one after the other.
        detector: judges them.

    Returns:
        "score", "stderr", "tasks" and "fd" (ShapesWorld-GenEval and FD-shapes), and "detector".
    """
    place = folder / settings.model.replace(" ", "-")
    EvaluationRun(place, list(prompts), settings).generate(draw)
    scores = score_folder(place, detector, device=settings.device).data
    return {
        "score": scores["overall"],
        "stderr": scores["overall_stderr"],
        "tasks": {tag: task["score"] for tag, task in scores["tasks"].items()},
        "fd": scores["fd_shapes"]["value"],
        "detector": scores["detector"],
    }
