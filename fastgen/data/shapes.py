"""ShapesWorld: a procedural, seeded, infinite text-to-image data set of square pictures, 64x64 unless asked otherwise.

Objects are anti-aliased signed-distance shapes; backgrounds are two-colour gradients with band-limited texture
noise, so that image tokens are uncertain the way those of natural images are. Picture `i` depends only on
`(seed, i)`, whatever batch it is drawn in; at another size it is the same picture, sharper.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fastgen.data.captions import Caption, sample_training_caption
from fastgen.data.scenes import COLORS, IMAGE_SIZE, SHAPES, SceneObject, SceneSpec, sample_scene

__all__ = ["COLORS", "IMAGE_SIZE", "SHAPES", "ShapesBatch", "ShapesWorld", "render"]

FloatArray = npt.NDArray[np.float32]

_CHUNK = 32  # pictures drawn at once: their float canvas stays in the second-level cache


@dataclass(frozen=True, slots=True)
class ShapesBatch:
    """A drawn batch.

    Args:
        images: uint8 [n, size, size, 3].
        captions: n captions with tag and content.
        scenes: the objects of each image, in units of a 64th of its side.
        instances: uint8 [n, size, size]; 0 is background, k + 1 is object k of the scene.
    """

    images: npt.NDArray[np.uint8]
    captions: list[Caption]
    scenes: list[tuple[SceneObject, ...]]
    instances: npt.NDArray[np.uint8]

    @property
    def texts(self) -> list[str]:
        """The caption texts."""
        return [caption.text for caption in self.captions]


class ShapesWorld:
    """The data set under one seed.

    Args:
        seed: any integer; different seeds give unrelated data.
        held_out: leave out of the captions what the evaluation prompts hold out (the default, for training).
        crossed: see `sample_training_caption`.
        size: side of the pictures in pixels, a multiple of 64.

    Raises:
        ValueError: size is not such a multiple.
    """

    def __init__(self, seed: int = 0, held_out: bool = True, crossed: bool = True, *, size: int = IMAGE_SIZE) -> None:
        self.seed = int(seed)
        self.held_out, self.crossed = held_out, crossed
        self.size = check_size(size)

    def batch(self, n: int, start: int = 0) -> ShapesBatch:
        """Draw items `start` … `start + n - 1`.

        Raises:
            ValueError: n or start is negative.
        """
        if n < 0 or start < 0:
            raise ValueError(f"n and start must not be negative, got n={n}, start={start}")
        captions: list[Caption] = []
        scenes: list[tuple[SceneObject, ...]] = []
        for index in range(start, start + n):
            rng = random.Random(f"{self.seed}/{index}")
            caption = sample_training_caption(rng, self.held_out, self.crossed)
            captions.append(caption)
            scenes.append(sample_scene(_fill_colors(caption, rng), rng))
        seeds = [(self.seed, index) for index in range(start, start + n)]
        images, instances = render(scenes, seeds, self.size)
        return ShapesBatch(images, captions, scenes, instances)


def _fill_colors(caption: Caption, rng: random.Random) -> SceneSpec:
    """Objects of one uncoloured count share their colour half of the time, as in photos of several equal things."""
    spec = caption.spec
    if caption.tag != "counting" or spec.objects[0].color is not None or rng.random() < 0.5:
        return spec
    color = rng.choice(COLORS)
    return SceneSpec(tuple(type(item)(item.shape, color) for item in spec.objects))


def check_size(size: int) -> int:
    """`size`, when it is a side that ShapesWorld can be drawn at.

    Raises:
        ValueError: it is no positive multiple of 64.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < IMAGE_SIZE or size % IMAGE_SIZE:
        raise ValueError(f"size: needs a positive multiple of {IMAGE_SIZE}, got {size!r}")
    return size


def render(
    scenes: Sequence[Sequence[SceneObject]], seeds: Sequence[tuple[int, int]], size: int = IMAGE_SIZE
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Draw scenes.

    Args:
        scenes: n scenes.
        seeds: n pairs of integers; each seeds the background of its picture.
        size: side of the pictures in pixels, a multiple of 64.

    Returns:
        images uint8 [n, size, size, 3] and instances uint8 [n, size, size] (0 background, k + 1 object k).

    Raises:
        ValueError: different numbers of scenes and seeds, or a size that is no multiple of 64.
    """
    check_size(size)
    if len(scenes) != len(seeds):
        raise ValueError(f"{len(scenes)} scenes need as many seeds, got {len(seeds)}")
    images = np.empty((len(scenes), size, size, 3), np.uint8)
    instances = np.zeros(images.shape[:3], np.uint8)
    chunk = max(1, _CHUNK * IMAGE_SIZE**2 // size**2)
    for first in range(0, len(scenes), chunk):
        part = slice(first, first + chunk)
        canvas = _backgrounds(seeds[part], size)
        _draw_objects(canvas, instances[part], scenes[part])
        canvas *= np.float32(255.0)
        canvas += np.float32(0.5)
        np.clip(canvas, 0.0, 255.0, out=canvas)
        images[part] = np.moveaxis(canvas.astype(np.uint8), 1, 3)
    return images, instances


def _draw_objects(
    canvas: FloatArray, instances: npt.NDArray[np.uint8], scenes: Sequence[Sequence[SceneObject]]
) -> None:
    """Draw all objects onto the planar canvas [n, 3, size, size]: coverage by shape at once, blending one by one.

    Objects never overlap, so the order does not matter.
    """
    size = canvas.shape[-1]
    scale = np.float32(size / IMAGE_SIZE)
    by_shape: dict[str, list[tuple[int, int]]] = {}
    for index, scene in enumerate(scenes):
        for slot, item in enumerate(scene):
            by_shape.setdefault(item.shape, []).append((index, slot))
    for shape, places in by_shape.items():
        objects = [scenes[index][slot] for index, slot in places]
        values = np.array([(o.cx, o.cy, o.radius, o.angle) for o in objects], np.float32)
        cx, cy, radius = scale * values.T[:3]
        angle = values[:, 3]
        window = min(2 * int(np.ceil(radius.max())) + 3, size)
        x0 = np.clip(np.rint(cx).astype(int) - window // 2, 0, size - window)
        y0 = np.clip(np.rint(cy).astype(int) - window // 2, 0, size - window)
        pixel = np.arange(window) + 0.5
        # Pixel centres in the object's own frame: unit radius, unrotated.
        dx = ((x0[:, None] + pixel - cx[:, None]) / radius[:, None]).astype(np.float32)[:, None, :]
        dy = ((y0[:, None] + pixel - cy[:, None]) / radius[:, None]).astype(np.float32)[:, :, None]
        cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
        distance = _DISTANCES[shape](dx * cos + dy * sin, dy * cos - dx * sin)
        # Anti-aliasing: coverage of a pixel by a straight edge at that signed distance (in pixels).
        alpha = np.clip(np.float32(0.5) - distance * radius[:, None, None], 0.0, 1.0)
        inside = alpha > 0.5
        for (index, slot), item, x, y, cover, owned in zip(
            places, objects, x0.tolist(), y0.tolist(), alpha, inside, strict=True
        ):
            area = canvas[index, :, y : y + window, x : x + window]
            area += cover * (np.array(item.rgb, np.float32)[:, None, None] - area)
            instances[index, y : y + window, x : x + window][owned] = slot + 1


def _circle(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.sqrt(x * x + y * y) - np.float32(0.9)


def _square(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.74)


def _triangle(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.maximum(y, np.float32(0.8660254) * np.abs(x) - np.float32(0.5) * y) - np.float32(0.5)


def _star(x: FloatArray, y: FloatArray) -> FloatArray:
    # Fold into one half of one of the five points, then take the distance to that point's edge.
    sector = np.float32(2 * np.pi / 5)
    radius, angle = np.sqrt(x * x + y * y), np.arctan2(x, -y)
    angle = np.abs(angle - sector * np.rint(angle / sector))
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    inner_x, inner_y = 0.45 * np.cos(np.pi / 5), 0.45 * np.sin(np.pi / 5)
    edge = np.hypot(inner_x - 1.0, inner_y)
    return ((px - 1.0) * (inner_y / edge) - py * ((inner_x - 1.0) / edge)).astype(np.float32)


def _cross(x: FloatArray, y: FloatArray) -> FloatArray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - np.float32(0.92), np.minimum(x, y) - np.float32(0.29))


def _ring(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.abs(np.sqrt(x * x + y * y) - np.float32(0.7)) - np.float32(0.22)


def _heart(x: FloatArray, y: FloatArray) -> FloatArray:
    # A square on its corner and a disc on each of its two upper edges.
    half = np.float32(0.52)
    offset = half * np.float32(0.70710678)
    x, y = np.abs(x), y - np.float32(0.08)
    square = np.maximum(np.abs(x + y), np.abs(x - y)) * np.float32(0.70710678) - half
    disc = np.sqrt((x - offset) ** 2 + (y + offset) ** 2) - half
    return np.minimum(square, disc)


def _diamond(x: FloatArray, y: FloatArray) -> FloatArray:
    # Taller than wide, so that it is not a rotated square; the factor makes the edge distance Euclidean.
    width = 0.62
    return ((np.abs(x) / width + np.abs(y) - 1.0) * (width / np.hypot(1.0, width))).astype(np.float32)


_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "diamond": _diamond,
}


@lru_cache
def _upsampling(cells: int, size: int) -> FloatArray:
    """[size, cells]: cubic (Catmull-Rom) interpolation of `cells` values to the pixels, so the noise has a band."""
    position = (np.arange(size) + 0.5) * cells / size - 0.5
    distance = np.abs(position[:, None] - np.arange(cells)[None, :])
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1.0
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4.0 * distance + 2.0
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


_COARSE, _FINE = 6, 16  # cells across the image of the two texture bands


def _backgrounds(seeds: Sequence[tuple[int, int]], size: int) -> FloatArray:
    """Two muted colours in a linear gradient, plus coarse coloured and fine grey texture; float [n, 3, size, size]."""
    n = len(seeds)
    coarse = np.empty((n, 3, _COARSE, _COARSE), np.float32)
    fine = np.empty((n, _FINE, _FINE), np.float32)
    uniform = np.empty((n, 8), np.float32)
    for index, (seed, item) in enumerate(seeds):
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, item], np.int64).astype(np.uint64)))
        uniform[index] = rng.random(8, np.float32)
        rng.standard_normal(out=coarse[index], dtype=np.float32)
        rng.standard_normal(out=fine[index], dtype=np.float32)
    first, second = _muted_color(uniform[:, 0:3]), _muted_color(uniform[:, 3:6])
    angle = uniform[:, 6] * np.float32(2 * np.pi)
    axis = (np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)) / np.float32(size)
    ramp = np.cos(angle)[:, None, None] * axis + np.sin(angle)[:, None, None] * axis[:, None]  # [n, size, size]
    blend = np.clip(ramp + np.float32(0.5), 0.0, 1.0)
    strength = (0.4 + 0.6 * uniform[:, 7])[:, None, None]
    coarse_up, fine_up = _upsampling(_COARSE, size), _upsampling(_FINE, size)
    canvas: FloatArray = coarse_up @ (coarse * np.float32(0.035)) @ coarse_up.T
    grey = fine_up @ (fine * np.float32(0.045) * strength) @ fine_up.T
    for channel in range(3):
        canvas[:, channel] += grey
        canvas[:, channel] += first[:, channel, None, None] + blend * (second - first)[:, channel, None, None]
    return canvas


def _muted_color(uniform: FloatArray) -> FloatArray:
    """[n, 3] colours of low saturation and middle brightness from three uniforms each: no object colour is near."""
    hue = uniform[:, 0:1] * 6.0
    saturation = 0.05 + 0.25 * uniform[:, 1:2]
    value = 0.36 + 0.32 * uniform[:, 2:3]
    k = (np.array([5.0, 3.0, 1.0], np.float32) + hue) % 6.0  # HSV to RGB for all three channels at once
    return np.asarray(value - value * saturation * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0), np.float32)
