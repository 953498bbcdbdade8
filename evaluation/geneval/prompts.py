"""The official GenEval prompts, regenerated: the published sampling procedure in own code.

The benchmark (Ghosh et al., 2023, arXiv:2310.11513; data under MIT) draws its prompts with a fixed seed from the 80
COCO classes, ten colours and four relations. Doing the same draws gives the same 553 lines, so nothing is vendored;
`METADATA_SHA256` checks them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fastgen.evaluation.geneval.metadata import Clause, Metadata

CLASSES: tuple[str, ...] = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
"""The 80 COCO classes in COCO's order, which is that of a detector's outputs; three have GenEval's own spelling."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TASKS: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SEED = 43
METADATA_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
IMAGES_PER_PROMPT = 4

# The order of the relations is that of the draw, not that of `metadata.RELATIONS`.
_RELATIONS = ("left of", "right of", "above", "below")
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_PER_TASK = 100


@functools.cache
def official_prompts() -> tuple[Metadata, ...]:
    """The 553 prompts in the order of the official file; duplicates of the draw are dropped, the first kept."""
    rng = np.random.default_rng(SEED)
    drawn = [item for draw in _DRAWS for item in draw(rng)]
    return tuple({item.to_json(): item for item in drawn}.values())


def _single_object(rng: np.random.Generator) -> Iterator[Metadata]:
    for index in rng.choice(len(CLASSES), size=len(CLASSES), replace=False):
        name = CLASSES[index]
        yield _metadata("single_object", [Clause(name, 1)], _a(name))


def _two_object(rng: np.random.Generator) -> Iterator[Metadata]:
    for _ in range(_PER_TASK):
        a, b = _pick(CLASSES, rng.choice(len(CLASSES), size=2, replace=False))
        yield _metadata("two_object", [Clause(a, 1), Clause(b, 1)], f"{_a(a)} and {_a(b)}")


def _counting(rng: np.random.Generator) -> Iterator[Metadata]:
    for _ in range(_PER_TASK):
        name = CLASSES[rng.choice(len(CLASSES))]
        count = int(rng.integers(2, 4, endpoint=True))
        phrase = f"{_NUMBERS[count]} {name}{'es' if name.endswith('s') else 's'}"
        yield _metadata("counting", [Clause(name, count)], phrase, exclude=[Clause(name, count + 1)])


def _colors(rng: np.random.Generator) -> Iterator[Metadata]:
    for _ in range(_PER_TASK):
        (name,) = _uncoloured_person([rng.choice(len(CLASSES) - 1)])
        color = COLORS[rng.choice(len(COLORS))]
        yield _metadata("colors", [Clause(name, 1, color)], _a(f"{color} {name}"))


def _position(rng: np.random.Generator) -> Iterator[Metadata]:
    for _ in range(_PER_TASK):
        a, b = _pick(CLASSES, rng.choice(len(CLASSES), size=2, replace=False))
        relation = _RELATIONS[rng.choice(len(_RELATIONS))]
        clauses = [Clause(b, 1), Clause(a, 1, position=(relation, 0))]
        yield _metadata("position", clauses, f"{_a(a)} {relation} {_a(b)}")


def _color_attr(rng: np.random.Generator) -> Iterator[Metadata]:
    for _ in range(_PER_TASK):
        names = _uncoloured_person(rng.choice(len(CLASSES) - 1, size=2, replace=False))
        colors = _pick(COLORS, rng.choice(len(COLORS), size=2, replace=False))
        clauses = [Clause(name, 1, color) for name, color in zip(names, colors, strict=True)]
        yield _metadata("color_attr", clauses, " and ".join(_a(f"{c.color} {c.class_name}") for c in clauses))


_DRAWS: Sequence[Callable[[np.random.Generator], Iterator[Metadata]]]
_DRAWS = (_single_object, _two_object, _counting, _colors, _position, _color_attr)


def _metadata(tag: str, include: list[Clause], words: str, exclude: Sequence[Clause] = ()) -> Metadata:
    return Metadata(tag=tag, include=tuple(include), exclude=tuple(exclude), prompt=f"a photo of {words}")


def _pick(names: Sequence[str], indices: Any) -> list[str]:
    return [names[int(index)] for index in indices]


def _uncoloured_person(indices: Any) -> list[str]:
    """Classes without "person", which the benchmark never colours, in the order that starts behind it."""
    start = CLASSES.index("person") + 1
    return [CLASSES[(int(index) + start) % len(CLASSES)] for index in indices]


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
