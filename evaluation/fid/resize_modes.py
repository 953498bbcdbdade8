"""How an image becomes the square that a feature network takes. Each mode is a named function, since the library that
resizes moves FID by several points (Parmar et al. 2022, arXiv:2104.11222).

Every function takes uint8 [H, W, 3] and a side, and gives float32 [3, side, side] in 0 .. 255.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

__all__ = ["RESIZE", "pil_bicubic", "pil_bicubic_float", "tf1_bilinear", "torch_bicubic", "torch_bilinear"]

Resize = Callable[[np.ndarray, int], Tensor]


def tf1_bilinear(image: np.ndarray, side: int) -> Tensor:
    """TensorFlow 1's ResizeBilinear with align_corners False: output pixel i reads at i * (old / new), without half
    pixels and without antialiasing; rows are blended after columns."""
    x = _channels_first(image)
    if x.shape[1:] == (side, side):
        return x
    top, bottom, down = _taps(x.shape[1], side)
    left, right, across = _taps(x.shape[2], side)

    def blended(rows: Tensor) -> Tensor:
        a, b = rows[:, :, left], rows[:, :, right]
        return a + (b - a) * across

    above, below = blended(x[:, top]), blended(x[:, bottom])
    return above + (below - above) * down[:, None]


def _taps(old: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper source index and the weight of the upper one, for each output pixel."""
    where = torch.arange(new, dtype=torch.float32) * torch.tensor(old / new, dtype=torch.float32)
    low = where.floor().long().clamp(max=old - 1)
    return low, (low + 1).clamp(max=old - 1), where - low


def pil_bicubic_float(image: np.ndarray, side: int) -> Tensor:
    """Pillow's bicubic, antialiased, each channel in floating point and never rounded to bytes; cut to 0 .. 255."""
    channels = [
        np.asarray(Image.fromarray(image[:, :, c].astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    return torch.from_numpy(np.stack(channels).clip(0, 255))


def torch_bilinear(image: np.ndarray, side: int) -> Tensor:
    """PyTorch's bilinear with half pixels (align_corners False) and without antialiasing."""
    x = _channels_first(image)[None]
    return functional.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)[0].clamp(0, 255)


def torch_bicubic(image: np.ndarray, side: int) -> Tensor:
    """PyTorch's bicubic with half pixels and without antialiasing; values may overshoot."""
    x = _channels_first(image)[None]
    return functional.interpolate(x, size=(side, side), mode="bicubic", align_corners=False)[0]


def pil_bicubic(image: np.ndarray, side: int) -> Tensor:
    """Pillow's bicubic on bytes, antialiased and rounded."""
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    return _channels_first(np.asarray(small))


def _channels_first(image: np.ndarray) -> Tensor:
    # Copied, since a decoded picture is often read-only and torch has no such tensors.
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


#: Mode -> function; the mode's name is in results and in the keys of cached statistics.
RESIZE: dict[str, Resize] = {
    "tf1-bilinear": tf1_bilinear,
    "pil-bicubic-float": pil_bicubic_float,
    "torch-bilinear": torch_bilinear,
    "torch-bicubic": torch_bicubic,
    "pil-bicubic": pil_bicubic,
}
