"""Pictures with captions as training data: a folder, webdataset shards, a zip file, or ShapesWorld renders.

    <folder>/a.png, a.txt             a caption file with the picture's name (.txt, or "caption" in .json)
    <folder>/metadata.jsonl           or all captions in one file, as in an image folder of Hugging Face `datasets`
    <folder>/00000.tar …              or webdataset shards, each picture with its .txt or .json

The model's own VAE and text encoder encode them during training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastgen.checks import check_integer
from fastgen.errors import FastgenError
from fastgen.evaluation.fid.readers import open_images
from fastgen.training.samples import Samples, Shuffled

__all__ = ["Pictures", "Renders", "TrainingData", "open_data"]

_CHECKED = 16  # pictures whose size is checked before anything is loaded


class TrainingData(Protocol):
    """Items by number."""

    @property
    def size(self) -> int | None:
        """Height and width in pixels, if the items are pictures."""

    @property
    def identity(self) -> str:
        """Identifies the items; "" if their files are compared instead."""

    def batch(self, start: int, size: int) -> tuple[Tensor, list[Any]]:
        """Latents float32 [size, C, h, w] or pictures uint8 [size, H, W, 3], and labels, of items start …
        start + size - 1."""


class Pictures(Shuffled):
    """Random access to pictures and their captions, shuffled for every pass.

    Pictures are resized to the shorter side and center-cropped to a square.

    Args:
        path: see the top of this module.
        size: height and width in pixels.
        seed: of the order.

    Raises:
        FastgenError: there are no pictures, some have no caption, or some are smaller than `size`.
    """

    def __init__(self, path: Path, size: int, seed: int = 0) -> None:
        self.path, self.size = path, check_integer("size", size, 1)
        self.source = open_images(path)
        if self.source.prompts is None:
            raise FastgenError(
                f"{path}: not all of its {len(self.source)} pictures have a caption; each needs a .txt file of its "
                'name, a "caption" in such a .json file, or a line in metadata.jsonl'
            )
        super().__init__(len(self.source), seed)
        self.identity = f"{len(self.source)} pictures of {size}: {self.source.names_digest()}"
        for place in np.unique(np.linspace(0, self.count - 1, _CHECKED, dtype=int)).tolist():
            self._pixels(place)

    def __reduce__(self) -> tuple[Any, ...]:  # open shards cannot be pickled for data-loading processes
        return Pictures, (self.path, self.size, self.seed)

    def batch(self, start: int, size: int) -> tuple[Tensor, list[Any]]:
        """Pictures uint8 [size, H, W, 3] and captions of items start … start + size - 1."""
        places = [self.place(index) for index in range(start, start + size)]
        prompts = self.source.prompts or ()
        return torch.stack([self._pixels(place) for place in places]), [prompts[place] for place in places]

    def _pixels(self, place: int) -> Tensor:
        pixels = self.source.read(place)
        height, width = pixels.shape[:2]
        if min(height, width) < self.size:
            raise FastgenError(
                f"{self.source.label(place)}: has {width}x{height} pixels, needs {self.size} or more on each side"
            )
        square = ImageOps.fit(Image.fromarray(pixels), (self.size, self.size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(square))


class Renders:
    """ShapesWorld: an endless stream of new pictures with captions."""

    identity = ""

    def __init__(self, seed: int, size: int) -> None:
        from fastgen.data.shapes import ShapesWorld

        self.size: int | None = size
        self.world = ShapesWorld(seed, size=size)

    def batch(self, start: int, size: int) -> tuple[Tensor, list[Any]]:
        """Pictures uint8 [size, H, W, 3] and captions."""
        drawn = self.world.batch(size, start)
        return torch.from_numpy(drawn.images), list(drawn.texts)


def open_data(path: Path, seed: int, size: int | None) -> Samples | Pictures:
    """The samples or the pictures at `path`.

    Args:
        path: a folder of `fastgen.training.samples`, or one for `Pictures`.
        seed: of the order.
        size: height and width of pictures in pixels; samples have a fixed size.

    Raises:
        FastgenError: there are no pictures, or they cannot be used.
    """
    if (path / "samples.json").is_file() or not path.exists():
        return Samples(path, seed)
    if size is None:
        raise FastgenError(f"size: {path} holds no samples.json; pictures need --size, their height and width")
    return Pictures(path, size, seed)
