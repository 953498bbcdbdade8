"""Image files as pixels, with an error that names the file."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from fastgen.errors import FastgenError

_DAMAGED = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # Pillow reports damage as any of these
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # 8 bits a channel or fewer


def decode_image(data: bytes, label: str) -> np.ndarray:
    """The bytes of an image file as uint8 [H, W, 3]; transparency is dropped.

    Raises:
        FastgenError: no readable image, or one with more than 8 bits a channel; the message starts with `label`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in _MODES:
                raise FastgenError(f"{label}: has pixels of mode {image.mode}; needs 8 bits a channel")
            return np.asarray(image.convert("RGB"))
    except FastgenError:
        raise
    except _DAMAGED as error:
        raise FastgenError(f"{label}: not a readable image: {error}") from error
