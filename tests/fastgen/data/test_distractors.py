"""Distractors: where they are drawn, and that they are none of the shapes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.data.distractors import add_blobs, draw_blob, texture, with_distractors
from fastgen.data.scenes import SHAPES, SceneObject
from fastgen.data.shapes import ShapesWorld, render


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 5))
def test_blobs_leave_objects_alone(seed: int, count: int) -> None:
    """No pixel of an object, nor any within two pixels of one, changes; the input is not written to."""
    batch = ShapesWorld(seed).batch(1)
    image, instances = batch.images[0], batch.instances[0]
    before = image.copy()
    drawn = add_blobs(image, instances, np.random.default_rng(seed), count)
    np.testing.assert_array_equal(image, before)
    changed = (drawn != image).any(axis=2)
    ys, xs = np.nonzero(instances)
    for y, x in zip(*np.nonzero(changed), strict=True):
        assert (abs(ys - y) + abs(xs - x)).min() > 2
    if count == 0:
        assert not changed.any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), radius=st.floats(5, 13))
def test_a_blob_is_whole_and_not_round(seed: int, radius: float) -> None:
    cover = draw_blob(np.random.default_rng(seed), radius)
    assert cover.min() >= 0 and cover.max() <= 1
    assert max(cover[0].max(), cover[-1].max(), cover[:, 0].max(), cover[:, -1].max()) == 0
    assert 0.5 * np.pi * radius**2 < cover.sum() < 2.2 * np.pi * radius**2


def test_no_blob_is_a_shape() -> None:
    """The best overlap of a blob with a drawn shape of its area and place stays clearly below identity."""
    rng = np.random.default_rng(0)
    overlaps = []
    for _ in range(60):
        cover = draw_blob(rng, 11.0) > 0.5
        canvas = np.zeros((64, 64), bool)
        offset = (64 - len(cover)) // 2
        canvas[offset : offset + len(cover), offset : offset + len(cover)] = cover
        ys, xs = np.nonzero(canvas)
        best = 0.0
        for shape in SHAPES:
            for scale in (10.0, 12.0, 14.0):
                item = SceneObject(shape, "red", xs.mean() + 0.5, ys.mean() + 0.5, scale, 0.0, (1.0, 0.0, 0.0))
                drawn = render([[item]], [(0, 0)])[1][0] > 0
                best = max(best, (drawn & canvas).sum() / (drawn | canvas).sum())
        overlaps.append(best)
    assert np.mean(overlaps) < 0.8 and max(overlaps) < 0.92


def test_truth_of_distracted_batches() -> None:
    """Emptied pictures have no truth; the others keep theirs; shares are those asked for."""
    batch = ShapesWorld(4).batch(300)
    result = with_distractors(batch, np.random.default_rng(1), empty=0.3, mixed=0.5)
    empty = np.array([not scene for scene in result.scenes])
    assert 60 <= empty.sum() <= 125  # 90 expected, four standard deviations
    assert not result.instances[empty].any()
    np.testing.assert_array_equal(result.instances[~empty], batch.instances[~empty])
    touched = (result.images != batch.images).any(axis=(1, 2, 3))
    assert touched[empty].all() and 50 <= touched[~empty].sum() <= 140


@pytest.mark.parametrize("seed", range(6))
def test_textures_are_pictures(seed: int) -> None:
    picture = texture(np.random.default_rng(seed))
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and picture.std() > 5
