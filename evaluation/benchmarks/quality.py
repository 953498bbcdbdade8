"""Scores of one row of a quality benchmark: the evaluation set drawn into a folder, resumable, and judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastgen.evaluation.geneval.metadata import Metadata
from fastgen.evaluation.geneval.shapes import ShapesModel
from fastgen.evaluation.runner import EvaluationRun, RunSettings, Sample
from fastgen.evaluation.shapesworld import score_folder
from fastgen.evaluation.verifiers.base import Verifier

__all__ = ["score_row"]

Draw = Callable[[list[str], list[int]], Iterator[Image.Image]]


def score_row(
    folder: Path,
    prompts: Sequence[Metadata],
    settings: RunSettings,
    draw: Draw,
    detector: ShapesModel,
    verifier: Verifier | None = None,
) -> dict[str, Any]:
    """Draw what is missing in the row's own folder below `folder`, and score it.

    Args:
        folder: of all rows.
        prompts: the evaluation set.
        settings: of the run; its model is the row's name.
        draw: pictures of prompts and seeds, one after the other.
        detector: judges them.
        verifier: asked beside it.

    Returns:
        "score", "stderr", "tasks" and "fd" (ShapesWorld-GenEval and FD-shapes), "detector", and with a verifier
        "verifier", its mean score.
    """
    place = folder / settings.model.replace(" ", "-")
    EvaluationRun(place, list(prompts), settings).generate(draw)
    scored = score_folder(place, detector, device=settings.device)
    scores = scored.data
    return {
        "score": scores["overall"],
        "stderr": scores["overall_stderr"],
        "tasks": {tag: task["score"] for tag, task in scores["tasks"].items()},
        "fd": scores["fd_shapes"]["value"],
        "detector": scores["detector"],
        **({} if verifier is None else {"verifier": _mean_score(verifier, scored.samples)}),
    }


def _mean_score(verifier: Verifier, samples: Sequence[Sample], batch: int = 64) -> float:
    """The verifier's score of pictures for their own prompts, over all of them."""
    total = 0.0
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        images = torch.stack([torch.from_numpy(sample.load().copy()).permute(2, 0, 1) for sample in part])
        total += float(verifier.score(images, [sample.metadata.prompt for sample in part]).double().sum())
    return total / len(samples)
