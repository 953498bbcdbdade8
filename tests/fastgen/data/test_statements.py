"""Captions that are true or false of scenes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen.data.captions import Caption, caption_of, sample_training_caption, vocabulary
from fastgen.data.scenes import ObjectSpec, SceneObject, SceneSpec, sample_scene
from fastgen.data.statements import false_caption, is_true, true_caption


def thing(shape: str, color: str, x: float = 0.0, y: float = 0.0) -> SceneObject:
    return SceneObject(shape, color, x, y, 8.0, 0.0, (1.0, 0.0, 0.0))


def says(tag: str, *items: tuple[str, str | None], relation: str | None = None) -> Caption:
    spec = SceneSpec(tuple(ObjectSpec(shape, color) for shape, color in items), relation)
    return caption_of(tag, spec, random.Random(0))


SCENE = (thing("circle", "red", 10, 10), thing("circle", "red", 40, 10), thing("star", "blue", 10, 40))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (says("single_object", ("circle", None)), True),
        (says("single_object", ("heart", None)), False),
        (says("colors", ("star", "blue")), True),
        (says("colors", ("star", "red")), False),
        (says("counting", ("circle", None), ("circle", None)), True),
        (says("counting", *[("circle", None)] * 3), False),
        (says("counting", ("circle", "red"), ("circle", "red")), True),
        (says("counting", ("circle", "blue"), ("circle", "blue")), False),
        (says("two_object", ("circle", None), ("star", None)), True),
        (says("two_object", ("circle", None), ("ring", None)), False),
        (says("color_attr", ("circle", "red"), ("star", "blue")), True),
        (says("color_attr", ("circle", "blue"), ("star", "red")), False),
        (says("position", ("circle", None), ("star", None), relation="above"), None),
        (says("position", ("circle", None), ("heart", None), relation="above"), False),
    ],
)
def test_truth(caption: Caption, expected: bool | None) -> None:
    assert is_true(caption, SCENE) is expected


def stands(caption: Caption, scene: tuple[SceneObject, ...]) -> bool:
    """Whether the relation that is named holds between the two objects, along its axis."""
    first, second = caption.spec.objects
    for a in scene:
        for b in scene:
            if a is b or a.shape != first.shape or b.shape != second.shape:
                continue
            if first.color not in (None, a.color) or second.color not in (None, b.color):
                continue
            dx, dy = a.cx - b.cx, a.cy - b.cy
            return {"left of": dx < 0, "right of": dx > 0, "above": dy < 0, "below": dy > 0}[
                caption.spec.relation or ""
            ]
    return False


@given(seed=st.integers(0, 100_000))
def test_drawn_captions_are_true_and_false(seed: int) -> None:
    rng = random.Random(seed)
    caption = sample_training_caption(rng, held_out=False)
    scene = sample_scene(caption.spec, rng)
    words = set(vocabulary())
    for _ in range(4):
        right, wrong = true_caption(caption, scene, rng), false_caption(caption, scene, rng)
        assert set(right.text.split()) | set(wrong.text.split()) <= words
        assert is_true(right, scene) is not False
        if right.spec.relation is not None:
            assert stands(right, scene)
        truth = is_true(wrong, scene)
        assert truth is False or (truth is None and not stands(wrong, scene))
        assert (wrong.tag, wrong.spec) != (caption.tag, caption.spec)
    assert true_caption(caption, (), rng).spec == caption.spec


def test_one_object_in_the_colour_of_another() -> None:
    """Scenes of several shapes give captions that only a look at shape and colour together refuses, often enough."""
    rng, mixed = random.Random(0), 0
    scene = (thing("circle", "red"), thing("star", "blue"))
    caption = says("color_attr", ("circle", "red"), ("star", "blue"))
    for _ in range(200):
        wrong = false_caption(caption, scene, rng)
        mixed += wrong.spec.objects in (
            (ObjectSpec("circle", "blue"),),
            (ObjectSpec("star", "red"),),
        )
    assert 40 <= mixed <= 90  # 2 changes of 7: 57 of 200, and what is lost to refused draws of others
    alone = (thing("circle", "red"), thing("circle", "red"))
    for _ in range(50):
        wrong = false_caption(says("counting", ("circle", "red"), ("circle", "red")), alone, rng)
        assert is_true(wrong, alone) is False
