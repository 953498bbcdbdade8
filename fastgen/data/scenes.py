"""Scenes of ShapesWorld: what objects a picture holds and where they stand, before any pixel is drawn."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

IMAGE_SIZE = 64
"""Side of a ShapesWorld image in pixels."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
COLORS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
MAX_OBJECTS = 5

# Radius range in pixels for a scene of 1, 2, … 5 objects: five must fit without touching, and the smallest must
# still span three 4-pixel image tokens so that its shape can be recognised.
RADIUS_RANGE: tuple[tuple[float, float], ...] = ((9.0, 16.0), (8.5, 13.0), (7.5, 11.0), (7.0, 9.5), (6.5, 8.5))
_MARGIN = 1.5  # pixels kept free between an object and the image border
_GAP = 2.0  # pixels kept free between two objects
_AXIS = {"left of": (-1.0, 0.0), "right of": (1.0, 0.0), "above": (0.0, -1.0), "below": (0.0, 1.0)}


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object of a scene.

    Args:
        shape: one of `SHAPES`.
        color: one of `COLORS`.
        cx, cy: centre in pixels, x to the right and y down; sub-pixel.
        radius: radius of the bounding circle in pixels.
        angle: rotation in radians.
        rgb: the jittered colour, three floats in [0, 1].
    """

    shape: str
    color: str
    cx: float
    cy: float
    radius: float
    angle: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class ObjectSpec:
    """What a caption says of one object; `None` leaves the choice to the scene."""

    shape: str
    color: str | None = None


@dataclass(frozen=True, slots=True)
class SceneSpec:
    """The content of a caption: its objects in order, and `relation`: object 0 stands `relation` object 1."""

    objects: tuple[ObjectSpec, ...]
    relation: str | None = None


# Base colours; jittered per object. Backgrounds stay muted (see shapes.py), so every colour stands out from them.
BASE_RGB: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.53, 0.06),
    "yellow": (0.96, 0.91, 0.14),
    "green": (0.11, 0.64, 0.19),
    "blue": (0.11, 0.24, 0.86),
    "purple": (0.55, 0.16, 0.70),
    "white": (0.95, 0.95, 0.95),
    "black": (0.05, 0.05, 0.05),
}
_COLOR_JITTER = 0.05


def _jitter_color(color: str, rng: random.Random) -> tuple[float, float, float]:
    red, green, blue = (
        min(max(value + rng.uniform(-_COLOR_JITTER, _COLOR_JITTER), 0.0), 1.0) for value in BASE_RGB[color]
    )
    return red, green, blue


def _place(radii: list[float], rng: random.Random) -> list[tuple[float, float]] | None:
    """Centres without overlap by rejection; `None` when 40 tries for one object fail."""
    centres: list[tuple[float, float]] = []
    for index, radius in enumerate(radii):
        low, high = radius + _MARGIN, IMAGE_SIZE - radius - _MARGIN
        for _ in range(40):
            x, y = rng.uniform(low, high), rng.uniform(low, high)
            if all(
                math.hypot(x - ox, y - oy) > radius + radii[other] + _GAP
                for other, (ox, oy) in enumerate(centres[:index])
            ):
                centres.append((x, y))
                break
        else:
            return None
    return centres


def _place_related(radii: list[float], relation: str, rng: random.Random) -> list[tuple[float, float]] | None:
    """Two centres such that the first stands `relation` the second, within 30 degrees of the axis."""
    axis_x, axis_y = _AXIS[relation]
    distance = radii[0] + radii[1] + rng.uniform(_GAP + 1.0, 14.0)
    tilt = rng.uniform(-math.pi / 6, math.pi / 6)
    dx = distance * (axis_x * math.cos(tilt) - axis_y * math.sin(tilt))
    dy = distance * (axis_x * math.sin(tilt) + axis_y * math.cos(tilt))
    lows = [radius + _MARGIN for radius in radii]
    highs = [IMAGE_SIZE - radius - _MARGIN for radius in radii]
    # The second centre must keep both objects inside the image.
    x_low, x_high = max(lows[1], lows[0] - dx), min(highs[1], highs[0] - dx)
    y_low, y_high = max(lows[1], lows[0] - dy), min(highs[1], highs[0] - dy)
    if x_low > x_high or y_low > y_high:
        return None
    x, y = rng.uniform(x_low, x_high), rng.uniform(y_low, y_high)
    return [(x + dx, y + dy), (x, y)]


def sample_scene(spec: SceneSpec, rng: random.Random) -> tuple[SceneObject, ...]:
    """Draw a scene that fits `spec`: sizes, colours left open, rotation, and places without overlap.

    Raises:
        ValueError: unknown shape, colour or relation, no object, more than `MAX_OBJECTS`, or a relation without
            exactly two objects.
    """
    count = len(spec.objects)
    if not 1 <= count <= MAX_OBJECTS:
        raise ValueError(f"a scene holds 1 to {MAX_OBJECTS} objects, got {count}")
    for item in spec.objects:
        if item.shape not in SHAPES or (item.color is not None and item.color not in COLORS):
            raise ValueError(f"unknown object {item}; shapes are {SHAPES}, colors are {COLORS}")
    if spec.relation is not None and (spec.relation not in RELATIONS or count != 2):
        raise ValueError(f"relation must be one of {RELATIONS} between two objects, got {spec.relation!r} for {count}")
    low, high = RADIUS_RANGE[count - 1]
    while True:
        radii = [rng.uniform(low, high) for _ in range(count)]
        centres = _place(radii, rng) if spec.relation is None else _place_related(radii, spec.relation, rng)
        if centres is not None:
            break
    objects = []
    for item, radius, (cx, cy) in zip(spec.objects, radii, centres, strict=True):
        color = item.color if item.color is not None else rng.choice(COLORS)
        angle = rng.uniform(-0.2, 0.2)
        objects.append(SceneObject(item.shape, color, cx, cy, radius, angle, _jitter_color(color, rng)))
    return tuple(objects)
