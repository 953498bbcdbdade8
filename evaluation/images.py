"""Image files as pixels, with an error that names the file. Files come from anywhere: sizes are checked before pixels
are decoded, and only formats that Pillow decodes itself are opened."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastgen.errors import FastgenError

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "check_image_file",
    "decode_image",
    "image_size",
    "name_skipped",
]

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_OTHER_SUFFIXES = (
    *(".apng", ".avif", ".dds", ".exr", ".gif", ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe"),
    *(".jxl", ".pam", ".pbm", ".pcx", ".pfm", ".pgm", ".pnm", ".psd", ".svg", ".tga", ".xbm", ".xpm"),
)
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 1 << 26  # 8192 x 8192, of a picture before it is decoded
MAX_FILE_BYTES = 256 << 20  # of an image file, before it is read
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # 8 bits a channel or fewer


def decode_image(data: bytes, label: str, *, upright: bool = False) -> np.ndarray:
    """The bytes of an image file as uint8 [H, W, 3]; transparency is dropped.

    Args:
        label: what to call it in a message.
        upright: turn it as its EXIF orientation says, as the official GenEval scorer does; FID protocols do not.

    Raises:
        FastgenError: no readable image, one with more than 8 bits a channel, or one of more than `MAX_PIXELS`; the
            message starts with `label`.
    """
    with _opened(data, label) as image:
        image.load()
        turned = ImageOps.exif_transpose(image) if upright else image
        return np.asarray(turned.convert("RGB"))


def check_image_file(data: bytes, label: str) -> None:
    """Look at the checksums, size and format of an image file without decoding its pixels.

    Raises:
        FastgenError: as `decode_image`.
    """
    with _opened(data, label) as image:
        image.verify()


def image_size(data: bytes, label: str) -> tuple[int, int]:
    """Width and height of an image file as its EXIF orientation shows it.

    Raises:
        FastgenError: as `decode_image`.
    """
    with _opened(data, label) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else (image.width, image.height)


@contextmanager
def _opened(data: bytes, label: str) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise FastgenError(
                    f"{label}: has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are allowed"
                )
            if image.mode not in _MODES or _sample_bits(image, data) > 8:
                raise FastgenError(f"{label}: has more than 8 bits a channel (mode {image.mode}); needs 8")
            yield image
    except FastgenError:
        raise
    except UnidentifiedImageError as error:
        raise FastgenError(f"{label}: not a readable image: its format is none of {', '.join(_FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise errors of a dozen types for damaged files
        raise FastgenError(f"{label}: not a readable image: {error}") from error


def name_skipped(place: object, names: Iterable[str], suffixes: Iterable[str] = _OTHER_SUFFIXES) -> None:
    """Say which images at `place` are passed over because of their format.

    Args:
        names: of all files there that are not read.
        suffixes: which of them are images.
    """
    skipped = sorted(name for name in names if PurePath(name).suffix.lower() in suffixes)
    if skipped:
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        shown = ", ".join(skipped[:3])
        logger.warning("%s: %d images of other formats are skipped: %s%s", place, len(skipped), shown, more)


def _sample_bits(image: Image.Image, data: bytes) -> int:
    """Bits of a channel as the file has them: Pillow reads 16-bit colour as 8-bit and drops the rest."""
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(258, 8)
        return max(bits) if isinstance(bits, tuple) else int(bits)
    if image.format == "PPM" and data[:2] in (b"P2", b"P3", b"P5", b"P6"):
        fields = re.sub(rb"#[^\r\n]*", b"", data[:4096]).split(maxsplit=4)
        return int(fields[3]).bit_length()
    return 8
