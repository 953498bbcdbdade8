"""Captions that are true or false of a scene: what a verifier learns to tell apart.

A false caption differs from a true one in one thing: a shape, a colour, a number, which colour belongs to which shape,
which object stands where; or it names one object in the colour of another. As in GenEval, "a red circle" is true of a
scene that holds more objects, and only numbers are exact.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from fastgen.data.captions import COUNT_WORDS, Caption, caption_of
from fastgen.data.scenes import COLORS, SHAPES, ObjectSpec, SceneObject, SceneSpec

__all__ = ["false_caption", "is_true", "true_caption"]

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _fits(item: ObjectSpec, thing: SceneObject) -> bool:
    return thing.shape == item.shape and item.color in (None, thing.color)


def is_true(caption: Caption, scene: Sequence[SceneObject]) -> bool | None:
    """Whether a caption is true of a scene; None where it says how objects that are there stand to each other, which
    depends on more than their names."""
    items = caption.spec.objects
    if caption.tag == "counting":
        return sum(_fits(items[0], thing) for thing in scene) == len(items)
    if len(items) == 1:
        return any(_fits(items[0], thing) for thing in scene)
    pair = any(_fits(items[0], a) and _fits(items[1], b) for a in scene for b in scene if a is not b)
    return None if pair and caption.spec.relation is not None else pair


def true_caption(caption: Caption, scene: Sequence[SceneObject], rng: random.Random) -> Caption:
    """The caption that the scene was drawn for, or one of a single object in it, both in new words."""
    if not scene or rng.random() < 0.7:
        return caption_of(caption.tag, caption.spec, rng)
    thing = rng.choice(list(scene))
    color = thing.color if rng.random() < 0.6 else None
    tag = "single_object" if color is None else "colors"
    return caption_of(tag, SceneSpec((ObjectSpec(thing.shape, color),)), rng)


def false_caption(caption: Caption, scene: Sequence[SceneObject], rng: random.Random) -> Caption:
    """A caption that is false of the scene that `caption` was drawn for, by one change."""
    changes: list[Callable[[Caption, random.Random], Caption | None]] = [_other_shape, _other_color]
    changes += {
        "counting": [_other_number] * 3,
        "position": [_other_place] * 6,
        "color_attr": [_swapped_colors] * 6,
    }.get(caption.tag, [])
    if len({thing.shape for thing in scene}) > 1:
        changes += [lambda caption, rng: _mixed(scene, rng)] * 3
    while True:
        changed = rng.choice(changes)(caption, rng)
        if changed is None:
            continue
        # The opposite of a relation that holds is false, though names alone do not tell.
        if is_true(changed, scene) is False or (changed.spec.relation is not None and _moved(caption, changed)):
            return changed


def _moved(caption: Caption, changed: Caption) -> bool:
    """Whether the change is one of place alone."""
    before, after = caption.spec, changed.spec
    swapped = after.objects == before.objects[::-1] and after.relation == before.relation
    return swapped or (after.objects == before.objects and after.relation == _OPPOSITE[before.relation or "above"])


def _with(caption: Caption, objects: tuple[ObjectSpec, ...], rng: random.Random) -> Caption:
    return caption_of(caption.tag, replace(caption.spec, objects=objects), rng)


def _changed(caption: Caption, rng: random.Random, **change: str) -> Caption:
    """With one object changed, or where they are counted all of them."""
    items = caption.spec.objects
    chosen = range(len(items)) if caption.tag == "counting" else [rng.randrange(len(items))]
    objects = tuple(replace(item, **change) if place in chosen else item for place, item in enumerate(items))
    return _with(caption, objects, rng)


def _other_shape(caption: Caption, rng: random.Random) -> Caption | None:
    taken = {item.shape for item in caption.spec.objects}
    return _changed(caption, rng, shape=rng.choice([name for name in SHAPES if name not in taken]))


def _other_color(caption: Caption, rng: random.Random) -> Caption | None:
    taken = {item.color for item in caption.spec.objects}
    if None in taken:
        return None
    return _changed(caption, rng, color=rng.choice([name for name in COLORS if name not in taken]))


def _mixed(scene: Sequence[SceneObject], rng: random.Random) -> Caption | None:
    """One object of the scene in the colour of another: to be seen through, shape and colour have to be bound."""
    first, second = rng.sample(list(scene), 2)
    if first.color == second.color:
        return None
    return caption_of("colors", SceneSpec((ObjectSpec(first.shape, second.color),)), rng)


def _other_number(caption: Caption, rng: random.Random) -> Caption | None:
    items = caption.spec.objects
    near = [count for count in COUNT_WORDS if abs(count - len(items)) == 1]
    count = rng.choice(near if rng.random() < 0.7 else [count for count in COUNT_WORDS if count != len(items)])
    return _with(caption, (items[0],) * count, rng)


def _other_place(caption: Caption, rng: random.Random) -> Caption | None:
    spec = caption.spec
    if rng.random() < 0.5:
        return _with(caption, spec.objects[::-1], rng)
    return caption_of(caption.tag, replace(spec, relation=_OPPOSITE[spec.relation or "above"]), rng)


def _swapped_colors(caption: Caption, rng: random.Random) -> Caption | None:
    first, second = caption.spec.objects
    return _with(caption, (replace(first, color=second.color), replace(second, color=first.color)), rng)
