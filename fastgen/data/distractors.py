"""Things that are not ShapesWorld objects, for a detector to reject: blobs in object colours, and strong texture.

A generator that fails draws such things. A detector that has only ever seen clean renders calls some of them a shape
with full confidence, which would flatter the generator.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_dilation, uniform_filter

from fastgen.data.scenes import BASE_RGB, COLORS, IMAGE_SIZE
from fastgen.data.shapes import ShapesBatch, render

_TRIES = 12  # places tried for one blob before it is left out
_CLEARANCE = 3  # pixels kept free between a blob and an object


def draw_blob(rng: np.random.Generator, radius: float) -> npt.NDArray[np.float32]:
    """Coverage [side, side] of an irregular blob of about `radius` pixels.

    Its outline is a circle with two or three strong low harmonics, so that it is none of the eight shapes: the
    amplitudes add up to 0.45 to 0.7 of the radius.
    """
    side = int(2 * np.ceil(1.7 * radius)) + 3
    axis = np.arange(side) - (side - 1) / 2
    distance, angle = np.hypot(*np.meshgrid(axis, axis)), np.arctan2(axis[:, None], axis[None, :])
    harmonics = rng.choice([1, 2, 3, 4], size=rng.integers(2, 4), replace=False)
    weights = rng.dirichlet(np.full(len(harmonics), 3.0)) * rng.uniform(0.45, 0.7)
    phases = rng.uniform(0, 2 * np.pi, len(harmonics))
    waves = weights[:, None, None] * np.cos(harmonics[:, None, None] * (angle + phases[:, None, None]))
    outline = radius * (1.0 + waves.sum(axis=0))
    return np.clip(0.5 + outline - distance, 0.0, 1.0).astype(np.float32)


def add_blobs(
    image: npt.NDArray[np.uint8], instances: npt.NDArray[np.uint8], rng: np.random.Generator, count: int
) -> npt.NDArray[np.uint8]:
    """A copy of `image` [64, 64, 3] with up to `count` blobs where `instances` [64, 64] leaves room.

    A third of the blobs run from one object colour into another, as half-finished pictures do.
    """
    canvas = image.astype(np.float32)
    taken = binary_dilation(instances > 0, iterations=_CLEARANCE) if instances.any() else instances > 0
    for _ in range(count):
        cover = draw_blob(rng, float(rng.uniform(5.0, 13.0)))
        side = len(cover)
        if side > IMAGE_SIZE:
            continue
        for _ in range(_TRIES):
            y, x = rng.integers(0, IMAGE_SIZE - side + 1, 2)
            if not taken[y : y + side, x : x + side][cover > 0].any():
                break
        else:
            continue
        first, second = (255.0 * np.array(BASE_RGB[COLORS[k]]) for k in rng.integers(0, len(COLORS), 2))
        ramp = np.linspace(0.0, 1.0, side)[:, None, None] if rng.random() < 1 / 3 else np.zeros((side, 1, 1))
        color = first + (second - first) * ramp
        area = canvas[y : y + side, x : x + side]
        area += cover[..., None] * (color - area)
        taken[y : y + side, x : x + side] |= cover > 0
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def texture(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """An object-free picture [64, 64, 3] of strong coloured noise in one random band."""
    cells = int(rng.choice([8, 16, 32, 64]))
    noise = rng.standard_normal((cells, cells, 3)) * rng.uniform(25, 70)
    repeat = IMAGE_SIZE // cells
    # Blocks of one noise value each, smoothed by a box of their size.
    picture = uniform_filter(noise.repeat(repeat, axis=0).repeat(repeat, axis=1), size=(repeat, repeat, 1))
    return np.clip(picture + rng.uniform(90, 160, 3), 0, 255).astype(np.uint8)


def with_distractors(batch: ShapesBatch, rng: np.random.Generator, empty: float, mixed: float) -> ShapesBatch:
    """A copy of `batch` in which some pictures hold distractors.

    Args:
        batch: renders with truth.
        rng: source of randomness.
        empty: share of the pictures that lose their objects and show one to four blobs, or texture, instead.
        mixed: share of the others that get up to two blobs next to their objects.
    """
    images, instances, scenes = batch.images.copy(), batch.instances.copy(), list(batch.scenes)
    for index, draw in enumerate(rng.random(len(images))):
        if draw < empty:
            seed = int(rng.integers(2**31)), int(rng.integers(2**31))
            scenes[index], instances[index] = (), 0
            background = render([()], [seed])[0][0]
            blank = rng.random() < 0.2
            images[index] = (
                texture(rng) if blank else add_blobs(background, instances[index], rng, int(rng.integers(1, 5)))
            )
        elif draw < empty + (1 - empty) * mixed:
            images[index] = add_blobs(images[index], instances[index], rng, 2)
    return ShapesBatch(images, batch.captions, scenes, instances)
