"""The GenEval rules and summary once more, in plain Python on tuples, written from the specification alone."""

from __future__ import annotations

import json
import math
from pathlib import Path


def oracle(data: dict, objects: list[tuple[str, float, tuple, str]], cap: int = 16) -> bool:
    """objects: (class, score, box, colour), all of them; True when the image is correct."""
    threshold = 0.9 if data["tag"] == "counting" else 0.3

    def visible(name: str) -> list[tuple]:
        return sorted((o for o in objects if o[0] == name and o[1] > threshold), key=lambda o: o[1])[::-1][:cap]

    def stands(a, b, relation: str) -> bool:
        off, rev = [], []
        for axis in (0, 1):
            size_a, size_b = a[axis + 2] - a[axis], b[axis + 2] - b[axis]
            delta = (a[axis] + a[axis + 2]) / 2 - (b[axis] + b[axis + 2]) / 2
            off.append(delta)
            rev.append(math.copysign(max(abs(delta) - 0.1 * (size_a + size_b), 0.0), delta))
        if abs(rev[0]) < 1e-3 and abs(rev[1]) < 1e-3:
            return False
        length = math.sqrt(off[0] ** 2 + off[1] ** 2)
        axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
        return sign * rev[axis] / length > 0.5

    good: list[list[tuple] | None] = []
    for clause in data["include"]:
        top = visible(clause["class"])[: clause["count"]]
        fine = len(top) == clause["count"]
        if fine and "color" in clause:
            fine = sum(o[3] == clause["color"] for o in top) >= clause["count"]
        if fine and "position" in clause:
            relation, target = clause["position"]
            others = good[target]
            fine = others is not None and all(stands(a[2], b[2], relation) for a in top for b in others)
        good.append(top if fine else None)
    clear = all(len(visible(clause["class"])) < clause["count"] for clause in data.get("exclude", []))
    return clear and all(group is not None for group in good)


def official_summary(path: Path) -> dict[str, float]:
    """What the official summary script prints of a results file: task means in order of appearance, their unweighted
    mean, and the shares of correct images and of prompts with a correct image; prompts differ if the texts of their
    metadata do."""
    tasks: dict[str, list[bool]] = {}
    prompts: dict[str, bool] = {}
    correct = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        assert isinstance(record["metadata"], str) and isinstance(record["correct"], bool)
        tasks.setdefault(record["tag"], []).append(record["correct"])
        prompts[record["metadata"]] = prompts.get(record["metadata"], False) or record["correct"]
        correct.append(record["correct"])
    scores = {tag: sum(values) / len(values) for tag, values in tasks.items()}
    return {
        **scores,
        "overall": sum(scores.values()) / len(scores),
        "correct_images": sum(correct) / len(correct),
        "correct_prompts": sum(prompts.values()) / len(prompts),
    }
