"""ShapesWorld: determinism, truth against an independent oracle, geometry, backgrounds."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.data.captions import sample_training_caption
from fastgen.data.scenes import COLORS, IMAGE_SIZE, RELATIONS, SHAPES, ObjectSpec, SceneObject, SceneSpec, sample_scene
from fastgen.data.shapes import ShapesWorld, render


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(-(2**40), 2**40), start=st.integers(0, 10**9), n=st.integers(0, 70), offset=st.integers(0, 69))
def test_item_depends_only_on_seed_and_index(seed: int, start: int, n: int, offset: int) -> None:
    """Any batch composition gives the same pictures, captions and truth."""
    world = ShapesWorld(seed)
    batch = world.batch(n, start)
    assert batch.images.shape == (n, 64, 64, 3) and batch.images.dtype == np.uint8
    assert len(batch.captions) == len(batch.scenes) == n
    if offset < n:
        single = world.batch(1, start + offset)
        np.testing.assert_array_equal(single.images[0], batch.images[offset])
        np.testing.assert_array_equal(single.instances[0], batch.instances[offset])
        assert single.texts[0] == batch.texts[offset] and single.scenes[0] == batch.scenes[offset]


def test_seeds_give_different_data() -> None:
    first, second = ShapesWorld(0).batch(8), ShapesWorld(1).batch(8)
    assert all((a != b).any() for a, b in zip(first.images, second.images, strict=True))


@pytest.mark.parametrize("factor", [2, 3])
def test_larger_pictures_show_the_same_scenes_sharper(factor: int) -> None:
    small, large = ShapesWorld(4).batch(40), ShapesWorld(4, size=64 * factor).batch(40)
    assert small.scenes == large.scenes and small.texts == large.texts
    assert large.images.shape == (40, 64 * factor, 64 * factor, 3)
    blocks = large.images.reshape(40, 64, factor, 64, factor, 3).mean(axis=(2, 4))
    assert np.abs(blocks - small.images).mean() < 0.5
    # A pixel of 64x64 belongs to the object that its middle in the larger picture belongs to, but at edges.
    owners = large.instances[:, factor // 2 :: factor, factor // 2 :: factor]
    assert (owners != small.instances).mean() < 0.02
    # Sharper, not enlarged: the columns that an edge takes are as many, and a smaller share of the picture.
    edges = [
        float((np.abs(np.diff(batch.images.astype(int), axis=2)).sum(axis=3) > 60).mean()) for batch in (small, large)
    ]
    assert edges[1] < 1.25 * edges[0] / factor


@pytest.mark.parametrize("size", [0, -64, 32, 100, 128.0, True, "128"])
def test_sizes_that_are_no_multiple_of_64_are_refused(size: object) -> None:
    for draw in (lambda: ShapesWorld(0, size=size), lambda: render([()], [(0, 0)], size)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"size: needs a positive multiple of 64, got"):
            draw()


@pytest.mark.parametrize(("n", "start"), [(-1, 0), (1, -1)])
def test_negative_arguments_are_refused(n: int, start: int) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        ShapesWorld(0).batch(n, start)


def test_truth_counts_and_visibility() -> None:
    """Every object of a scene owns pixels, lies inside the picture and overlaps no other."""
    batch = ShapesWorld(3).batch(400)
    for scene, instances in zip(batch.scenes, batch.instances, strict=True):
        assert set(np.unique(instances)) == set(range(len(scene) + 1))
        for k, item in enumerate(scene):
            ys, xs = np.nonzero(instances == k + 1)
            assert len(ys) > 25
            assert math.hypot(xs.mean() + 0.5 - item.cx, ys.mean() + 0.5 - item.cy) < 0.3 * item.radius
            assert max(abs(xs + 0.5 - item.cx).max(), abs(ys + 0.5 - item.cy).max()) <= item.radius + 0.5
        for i, a in enumerate(scene):
            for b in scene[:i]:
                assert math.hypot(a.cx - b.cx, a.cy - b.cy) > a.radius + b.radius


def _inside(shape: str, x: float, y: float) -> bool:
    """Membership in a unit shape, written independently of the signed distances: half planes and polygons."""
    if shape == "circle":
        return math.hypot(x, y) < 0.9
    if shape == "square":
        return abs(x) < 0.74 and abs(y) < 0.74
    if shape == "ring":
        return 0.48 < math.hypot(x, y) < 0.92
    if shape == "cross":
        return (abs(x) < 0.29 and abs(y) < 0.92) or (abs(y) < 0.29 and abs(x) < 0.92)
    if shape == "diamond":
        return abs(x) / 0.62 + abs(y) < 1
    if shape == "heart":
        y -= 0.08
        reach = 0.52 * math.sqrt(2)
        lobes = any(math.hypot(x - s * reach / 2, y + reach / 2) < 0.52 for s in (-1, 1))
        return lobes or abs(x) + abs(y) < reach
    corners = 3 if shape == "triangle" else 10
    points = []
    for k in range(corners):
        radius = 1.0 if shape == "triangle" or k % 2 == 0 else 0.45
        angle = 2 * math.pi * k / corners
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    inside = False
    for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):
        if (y1 > y) != (y2 > y) and x < (x2 - x1) * (y - y1) / (y2 - y1) + x1:
            inside = not inside
    return inside


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    radius=st.floats(6.5, 16),
    angle=st.floats(-0.2, 0.2),
    cx=st.floats(18, 46),
    cy=st.floats(18, 46),
)
def test_pixels_match_supersampled_oracle(shape: str, radius: float, angle: float, cx: float, cy: float) -> None:
    """Object coverage equals that of a 6x6 supersampled membership test, up to anti-aliasing of corners."""
    white, black = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    scenes = [[SceneObject(shape, "white", cx, cy, radius, angle, rgb)] for rgb in (white, black)]
    images, _ = render(scenes, [(0, 0), (0, 0)])  # the same background under both
    alpha = (images[0].astype(float) - images[1].astype(float)).mean(axis=2) / 255.0
    expected = np.zeros((IMAGE_SIZE, IMAGE_SIZE))
    offsets = (np.arange(6) + 0.5) / 6
    reach = int(radius) + 2
    for row in range(max(0, int(cy) - reach), min(64, int(cy) + reach + 1)):
        for column in range(max(0, int(cx) - reach), min(64, int(cx) + reach + 1)):
            hits = 0
            for oy in offsets:
                for ox in offsets:
                    dx, dy = (column + ox - cx) / radius, (row + oy - cy) / radius
                    c, s = math.cos(angle), math.sin(angle)
                    hits += _inside(shape, dx * c + dy * s, dy * c - dx * s)
            expected[row, column] = hits / 36
    assert np.abs(alpha - expected).mean() < 0.004
    assert abs(alpha.sum() - expected.sum()) < 0.06 * expected.sum()


def test_background_is_textured_and_muted() -> None:
    """Local contrast everywhere, but no background pixel near an object colour's saturation."""
    batch = ShapesWorld(5).batch(100)
    for image, instances in zip(batch.images, batch.instances, strict=True):
        background = image[instances == 0].astype(float) / 255
        assert background.std(axis=0).min() > 0.015
        assert np.quantile(background.max(axis=1) - background.min(axis=1), 0.9) < 0.45


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), relation=st.sampled_from(RELATIONS), a=st.sampled_from(SHAPES))
def test_relations_hold_within_45_degrees(seed: int, relation: str, a: str) -> None:
    spec = SceneSpec((ObjectSpec(a), ObjectSpec("ring")), relation)
    first, second = sample_scene(spec, random.Random(seed))
    dx, dy = first.cx - second.cx, first.cy - second.cy
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    across = abs(dy) if relation in ("left of", "right of") else abs(dx)
    assert along > 0 and across < along


@pytest.mark.parametrize(
    "spec",
    [
        SceneSpec(()),
        SceneSpec((ObjectSpec("circle"),) * 6),
        SceneSpec((ObjectSpec("blob"),)),
        SceneSpec((ObjectSpec("circle", "mauve"),)),
        SceneSpec((ObjectSpec("circle"),), "left of"),
        SceneSpec((ObjectSpec("circle"), ObjectSpec("star")), "behind"),
    ],
)
def test_bad_scenes_are_refused(spec: SceneSpec) -> None:
    with pytest.raises(ValueError, match="scene holds|unknown object|relation must be"):
        sample_scene(spec, random.Random(0))


def test_five_objects_always_fit() -> None:
    rng = random.Random(0)
    spec = SceneSpec((ObjectSpec("square"),) * 5)
    assert all(len(sample_scene(spec, rng)) == 5 for _ in range(300))


def test_colours_left_open_are_all_drawn() -> None:
    """Chi-square of open colours against the uniform law; p < 1e-6 would be a defect."""
    from scipy import stats

    rng = random.Random(7)
    spec = SceneSpec((ObjectSpec("circle"), ObjectSpec("star")))
    drawn = [item.color for _ in range(1500) for item in sample_scene(spec, rng)]
    counts = [drawn.count(color) for color in COLORS]
    assert stats.chisquare(counts).pvalue > 1e-6


def test_captions_describe_their_scenes() -> None:
    batch = ShapesWorld(11).batch(500)
    for caption, scene in zip(batch.captions, batch.scenes, strict=True):
        assert len(caption.spec.objects) == len(scene)
        for item, drawn in zip(caption.spec.objects, scene, strict=True):
            assert item.shape == drawn.shape and item.color in (None, drawn.color)
    assert sample_training_caption(random.Random(0)).text == sample_training_caption(random.Random(0)).text
