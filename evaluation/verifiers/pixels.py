"""Preprocessing of uint8 pictures for the networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["fit_and_pad", "pad_to_square", "processed"]


def processed(processor: Any, images: Tensor) -> Any:
    """The output of a transformers image processor for pictures uint8 [k, 3, H, W].

    With torchvision it works on the pictures' device; its bicubic resize differs from Pillow's by one level at most.
    """
    pictures = images if processor.backend == "torchvision" else images.cpu()
    return processor(images=list(pictures), return_tensors="pt", input_data_format="channels_first")


def pad_to_square(images: Tensor, color: Sequence[float]) -> Tensor:
    """Pictures uint8 [k, 3, H, W] in the middle of squares of `color` (RGB, 0 to 1): [k, 3, S, S], S = max(H, W)."""
    height, width = images.shape[2:]
    size = max(height, width)
    if height == width:
        return images
    fill = torch.tensor([int(value * 255) for value in color], dtype=torch.uint8, device=images.device)
    square = fill.view(1, 3, 1, 1).repeat(len(images), 1, size, size)
    top, left = (size - height) // 2, (size - width) // 2
    square[:, :, top : top + height, left : left + width] = images
    return square


def fit_and_pad(images: Tensor, size: int) -> Tensor:
    """uint8 [k, 3, H, W] -> float32 [k, 3, size, size] around 0 to 1: the longer side fitted, the rest black.

    Bicubic with antialiasing, on floats and without rounding, so values may overshoot.
    """
    pixels = images.float() / 255
    height, width = images.shape[2:]
    scale = size / max(height, width)
    new = (max(round(height * scale), 1), max(round(width * scale), 1))
    if new != (height, width):
        pixels = functional.interpolate(pixels, size=new, mode="bicubic", antialias=True)
    down, right = size - new[0], size - new[1]
    return functional.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))
