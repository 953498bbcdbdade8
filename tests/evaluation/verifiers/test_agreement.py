"""Agreement of scores with verdicts, against pairs counted one by one and on pictures that were rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastgen.data.captions import evaluation_prompts
from fastgen.evaluation.geneval.metadata import Metadata, write_metadata
from fastgen.evaluation.geneval.shapes_checker import ShapesChecker
from fastgen.evaluation.shapesworld import render_prompts
from fastgen.evaluation.verifiers.agreement import agreement, auroc, folder_agreement
from fastgen.evaluation.verifiers.base import Verifier


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
def test_auroc_counts_pairs_with_ties_half(pairs: list[tuple[int, bool]]) -> None:
    scores, correct = np.array([score for score, _ in pairs]), np.array([right for _, right in pairs])
    counted = [(a > b) + 0.5 * (a == b) for a in scores[correct] for b in scores[~correct]]
    found = auroc(scores, correct)
    assert found is None if not counted else found == pytest.approx(np.mean(counted))


def test_numbers_by_task() -> None:
    found = agreement([0.9, 0.2, 0.6, 0.05], [True, False, False, False], ["a", "a", "b", "b"], probabilities=True)
    assert (found["n"], found["correct"], found["auroc"], found["accuracy"]) == (4, 0.25, 1.0, 0.75)
    assert found["brier"] == pytest.approx((0.01 + 0.04 + 0.36 + 0.0025) / 4)
    assert found["calibration_error"] == pytest.approx((0.1 + 0.2 + 0.6 + 0.05) / 4)
    assert found["tasks"]["a"]["auroc"] == 1.0 and found["tasks"]["b"]["auroc"] is None
    assert "brier" not in agreement([3.0, 4.0], [True, False]) and agreement([], [])["auroc"] is None


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (([0.1], [True, False]), "need as many"),
        (([0.1], [True], ["a", "b"]), "need as many"),
        (([float("nan")], [True]), "no number"),
    ],
)
def test_bad_input_is_refused(arguments: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        agreement(*arguments)


class Redness(Verifier):
    name, range = "redness", (0.0, 1.0)

    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        assert all(isinstance(prompt, str) for prompt in prompts)
        return images[:, 0].float().mean(dim=(1, 2)) / 255

    def to(self, device: Any) -> Redness:
        return self


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    """Renders are correct; where one is painted black it is not, and scores lowest."""
    items = [Metadata.from_dict(data) for data in evaluation_prompts()[::60]]
    pictures = list(render_prompts([item.prompt for item in items], [0] * len(items)))
    for number, (item, picture) in enumerate(zip(items, pictures, strict=True)):
        (tmp_path / f"{number:05d}" / "samples").mkdir(parents=True)
        write_metadata(tmp_path / f"{number:05d}" / "metadata.jsonl", [item])
        picture.save(tmp_path / f"{number:05d}" / "samples" / "0000.png")
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number:05d}" / "samples" / "0001.png")
    found = folder_agreement(tmp_path, Redness(), ShapesChecker(), batch=5)
    assert found["n"] == 12 and found["correct"] == 0.5 and found["auroc"] == 1.0
    assert len(found["tasks"]) == 6 and found["tasks"]["counting"]["n"] == 2
