"""Bilinear resizing of 8-bit pictures bit for bit as OpenCV 4 does it, in numpy.

The detector of GenEval sees pictures through `cv2.resize(..., INTER_LINEAR)` on uint8: no antialiasing, and
fixed-point weights that round differently from every float implementation. Its scores near the 0.3 and 0.9 thresholds
depend on such details, so they are kept; OpenCV itself is not needed.
"""

from __future__ import annotations

import numpy as np

_ONE = 1 << 11  # weights are integers of 11 bits


def resize_linear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [height, width, C], equal to `cv2.resize(image, (width, height))` of OpenCV 4.

    A picture that has the size already is returned as it is; one that is exactly twice as large in both directions
    is averaged over 2x2 pixels, which OpenCV takes for bilinear there.

    Raises:
        ValueError: the picture is not uint8 [H, W, C] or a size is below 1.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or 0 in image.shape or min(height, width) < 1:
        raise ValueError(f"image: needs non-empty uint8 [H, W, C] and sizes >= 1, got {image.dtype} {image.shape}, "
                         f"{height}x{width}")  # fmt: skip
    if image.shape[:2] == (height, width):
        return image
    if image.shape[:2] == (2 * height, 2 * width):
        quads = image.reshape(height, 2, width, 2, -1).sum(axis=(1, 3), dtype=np.uint16)
        return ((quads + 2) >> 2).astype(np.uint8)
    left, right, weight = _taps(image.shape[1], width)
    inside = (left >= 0) & (right < image.shape[1])
    weight = np.where(inside, weight, np.float32(0))  # at the sides the outermost pixel alone; above and below not
    first, second = (part[:, None] for part in _fixed(weight))
    left = np.clip(left, 0, image.shape[1] - 1)
    right = np.clip(right, 0, image.shape[1] - 1)
    top, bottom, weight = _taps(image.shape[0], height)
    top, bottom = np.clip(top, 0, image.shape[0] - 1), np.clip(bottom, 0, image.shape[0] - 1)
    rows = {int(row) for row in np.concatenate([top, bottom])}
    needed = np.array(sorted(rows))
    source = image[needed].astype(np.int32)
    across = (source[:, left] * first + source[:, right] * second) >> 4
    place = np.searchsorted(needed, top), np.searchsorted(needed, bottom)
    above, below = (part[:, None, None] for part in _fixed(weight))
    mixed = ((above * across[place[0]]) >> 16) + ((below * across[place[1]]) >> 16)
    return ((mixed + 2) >> 2).astype(np.uint8)


def _taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the two source pixels of every target pixel, unclipped, and the weight of the second, float32."""
    scale = 1.0 / (target / source)
    centre = ((np.arange(target) + 0.5) * scale - 0.5).astype(np.float32)
    first = np.floor(centre)
    return first.astype(np.int64), first.astype(np.int64) + 1, centre - first


def _fixed(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of both pixels as integers, rounded half to even."""
    first = np.rint((np.float32(1) - weight) * np.float32(_ONE)).astype(np.int32)
    return first, np.rint(weight * np.float32(_ONE)).astype(np.int32)
