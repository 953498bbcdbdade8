"""`judge`: the verdict as one pure function, on the official prompts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from geneval_oracle import oracle

from fastgen.evaluation.geneval.judge import Detection, Judgement, judge
from fastgen.evaluation.geneval.metadata import Metadata
from fastgen.evaluation.geneval.prompts import CLASSES, COLORS, TASKS, official_prompts

SHIFT = {"left of": (-60, 0), "right of": (60, 0), "above": (0, -60), "below": (0, 60)}
# At the thresholds of the rules in single precision, and next to them.
EDGES = [value for limit in (0.3, 0.9) for value in (
    np.float32(limit), np.nextafter(np.float32(limit), np.float32(1)), np.nextafter(np.float32(limit), np.float32(0))
)]  # fmt: skip


def scene(data: dict, rng: np.random.Generator) -> list[tuple]:
    """(class, score, box, colour) near what a prompt asks for, spoilt a little; no two scores are equal."""
    objects = []
    for clause in data["include"]:
        dx, dy = SHIFT[clause["position"][0]] if "position" in clause else (0, 0)
        for _ in range(clause["count"] + int(rng.choice([-1, 0, 0, 0, 0, 0, 1, 14]))):
            x, y = 100 + dx + rng.integers(-60, 61), 100 + dy + rng.integers(-60, 61)
            w, h = rng.integers(1, 90, 2)
            color = clause.get("color", "red") if rng.random() < 0.85 else COLORS[rng.integers(10)]
            score = np.float32(rng.uniform(0.9, 1)) if rng.random() < 0.9 else EDGES[rng.integers(len(EDGES))]
            objects.append((clause["class"], score, (x, y, x + w, y + h), color))
    for _ in range(rng.integers(0, 3)):
        name = CLASSES[rng.integers(80)] if rng.random() < 0.5 else data["include"][0]["class"]
        objects.append((name, np.float32(rng.random()), (1, 1, 9, 9), "white"))
    unique = {float(item[1]): item for item in objects}
    return [list(unique.values())[i] for i in rng.permutation(len(unique))]


def test_agrees_with_the_oracle_on_many_scenes_of_the_official_prompts() -> None:
    """11,060 scenes, 20 of every prompt. Scores are single precision; the oracle compares with the thresholds in the
    same precision by taking the next lower double for those that are equal."""
    rng = np.random.default_rng(5)
    verdicts: Counter[tuple[str, bool]] = Counter()
    for item in official_prompts():
        data = item.as_dict()
        for _ in range(20):
            objects = scene(data, rng)
            colors = {box_and_score(o): o[3] for o in objects}
            found = judge(
                [Detection(name, box, score) for name, score, box, _ in objects],
                data,
                lambda _, items, colors=colors: [colors[float(d.score), tuple(d.box)] for d in items],
            )
            limits = {np.float32(limit): np.nextafter(limit, 0) for limit in (0.3, 0.9)}
            exact = [(o[0], limits.get(o[1], float(o[1])), o[2], o[3]) for o in objects]
            assert found.correct == oracle(data, exact), (data, objects)
            assert found.correct == (found.reason == "")
            verdicts[item.tag, found.correct] += 1
    assert sum(verdicts.values()) == 553 * 20
    assert all(verdicts[tag, verdict] > 70 for tag in TASKS for verdict in (True, False)), verdicts


def box_and_score(item: tuple) -> tuple:
    return float(item[1]), tuple(item[2])


def test_takes_metadata_parsed_or_not_and_says_why() -> None:
    data = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}
    seen = [Detection("cat", (0, 0, 4, 4), 0.31), Detection("dog", (0, 0, 4, 4), 0.99)]
    assert judge(seen, data) == judge(seen, Metadata.from_dict(data)) == Judgement(True, "")
    assert judge(seen[1:], data) == judge([], data) == Judgement(False, "expected cat>=1, found 0")
    with pytest.raises(ValueError, match="missing include"):
        judge(seen, {"tag": "single_object", "prompt": "p"})


def test_colour_classifier_gets_the_best_detections_with_their_masks() -> None:
    data = {"tag": "colors", "include": [{"class": "cat", "count": 2, "color": "red"}], "prompt": "p"}
    masks = np.eye(3, dtype=bool)[:, None]
    seen = [Detection("cat", (i, 0, i + 1, 1), score, masks[i]) for i, score in enumerate((0.5, 0.9, 0.7))]
    calls = []

    def classify(name: str, items: list[Detection]) -> list[str]:
        calls.append((name, [item.score for item in items]))
        assert all(item.mask is masks[int(item.box[0])] or (item.mask == masks[int(item.box[0])]).all()
                   for item in items)  # fmt: skip
        return ["red"] * len(items)

    assert judge(seen, data, classify).correct
    assert calls == [("cat", [0.9, 0.7])]
    assert judge(seen, data, lambda _, items: ["red", "blue"]).reason == "expected red cat>=2, found 1 blue, 1 red"
    with pytest.raises(ValueError, match="demands a colour of 'cat'"):
        judge(seen, data)


def test_detections_are_checked() -> None:
    data = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "p"}
    for bad, message in (
        (Detection("cat", (0, 0, 1), 0.5), "boxes"),
        (Detection("cat", (0, 0, 1, 1), float("nan")), "NaN"),
        (Detection("cat", (4, 0, 1, 1), 0.5), "x1 <= x2"),
        (Detection("", (0, 0, 1, 1), 0.5), "class names"),
        (Detection("cat", (0, 0, 1, 1), 1.5), "0, 1"),
    ):
        with pytest.raises(ValueError, match=message):
            judge([bad], data)
