"""Resizing as OpenCV 4 does it: digests of what OpenCV gave, OpenCV itself where it is installed, and exact bounds."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from fastgen.evaluation.geneval.opencv_resize import resize_linear

# sha256 (12 digits) of cv2.resize(..., INTER_LINEAR) of OpenCV 4.10.0, 4.12.0 and 5.0.0, which agree.
DIGESTS = {
    (512, 512, 800, 800): "9bab8ee58558",
    (1024, 1024, 800, 800): "57030912807d",
    (768, 1344, 762, 1333): "ae483be1f43e",
    (300, 451, 800, 1203): "8b2a9561372f",
    (1600, 1600, 800, 800): "2dd289e1c038",
    (64, 64, 800, 800): "bf97f8477393",
    (37, 53, 19, 71): "6449fcb883df",
    (1, 5, 3, 2): "614a57e7b06d",
}


def picture(height: int, width: int) -> np.ndarray:
    """Noise on a gradient: every weight matters, and so does every rounding."""
    rng = np.random.default_rng((height, width))
    ramp = np.linspace(0, 200, height)[:, None, None] * np.linspace(0.2, 1, width)[None, :, None]
    return (ramp + rng.integers(0, 56, (height, width, 3))).astype(np.uint8)


def exact(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear in float64, half-pixel centres, edges repeated, a loop over target pixels."""
    out = np.zeros((height, width, 3))
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * image.shape[0] / height - 0.5, 0), image.shape[0] - 1)
            u = min(max((x + 0.5) * image.shape[1] / width - 0.5, 0), image.shape[1] - 1)
            v0, u0 = int(v), int(u)
            v1, u1 = min(v0 + 1, image.shape[0] - 1), min(u0 + 1, image.shape[1] - 1)
            a, b = v - v0, u - u0
            top = (1 - b) * image[v0, u0].astype(float) + b * image[v0, u1]
            out[y, x] = (1 - a) * top + a * ((1 - b) * image[v1, u0].astype(float) + b * image[v1, u1])
    return out


@pytest.mark.parametrize(("sizes", "digest"), DIGESTS.items(), ids=str)
def test_gives_what_opencv_gave(sizes: tuple[int, int, int, int], digest: str) -> None:
    out = resize_linear(picture(*sizes[:2]), *sizes[2:])
    assert hashlib.sha256(out.tobytes()).hexdigest()[:12] == digest


def test_equals_opencv() -> None:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed; the digests stand in")
    rng = np.random.default_rng(0)
    for case in range(300):
        h, w, height, width = (int(v) for v in rng.integers(1, 90, 4))
        if case % 5 == 0:
            h, w = 2 * height, 2 * width
        image = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        theirs = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(resize_linear(image, height, width), theirs), (h, w, height, width)


@pytest.mark.parametrize(
    "sizes", [(17, 23, 31, 40), (31, 40, 17, 23), (1, 1, 5, 7), (9, 1, 3, 4), (8, 6, 4, 3), (8, 6, 4, 6), (5, 7, 5, 9)]
)
def test_is_within_one_level_of_exact_arithmetic(sizes: tuple[int, int, int, int]) -> None:
    image = picture(*sizes[:2])
    out = resize_linear(image, *sizes[2:])
    assert out.shape == (*sizes[2:], 3) and out.dtype == np.uint8
    assert np.abs(out - exact(image, *sizes[2:])).max() <= 1.01


def test_the_same_size_changes_nothing() -> None:
    image = picture(12, 9)
    assert resize_linear(image, 12, 9) is image


def test_strided_input() -> None:
    image = picture(20, 20)[::2, ::-1]
    assert np.array_equal(resize_linear(image, 7, 9), resize_linear(image.copy(), 7, 9))


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 3))])
def test_refuses_other_arrays(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image"):
        resize_linear(image, 2, 2)
