"""Image files from anywhere: bombs, depth by content, orientation, formats, damage."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastgen.errors import FastgenError
from fastgen.evaluation.images import MAX_PIXELS, check_image_file, decode_image


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int = 8, color: int = 2, data: bytes = b"") -> bytes:
    """A PNG of this header with any data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("size", [(MAX_PIXELS + 1, 1), (9000, 9000), (1 << 20, 1 << 20), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    """Nothing of these sizes could be decoded within the memory of a test."""
    for read in (decode_image, check_image_file):
        with pytest.raises(FastgenError, match=r"^a\.png: .*(pixels|exceeds limit)"):
            read(png(*size), "a.png")


def test_a_large_picture_is_no_bomb() -> None:
    assert decode_image(saved(Image.new("RGB", (4096, 4096), "red"), "PNG"), "a").shape == (4096, 4096, 3)


@pytest.mark.parametrize(
    "data",
    [
        png(2, 2, 16, 2, bytes(2 * (1 + 12))),  # colour: Pillow would read it as 8-bit
        png(2, 2, 16, 6, bytes(2 * (1 + 16))),
        png(2, 2, 16, 0, bytes(2 * (1 + 4))),
        b"P6 2 2 65535\n" + bytes(24),
        b"P5\n# a comment\n2 2\n1023\n" + bytes(8),
        saved(Image.fromarray(np.zeros((2, 2), np.uint16)), "TIFF"),
        saved(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"),
    ],
)
def test_more_than_eight_bits_are_seen_in_the_file(data: bytes) -> None:
    with pytest.raises(FastgenError, match="^a: has more than 8 bits a channel"):
        decode_image(data, "a")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP"])
def test_eight_bits_are_read_in_every_format(kind: str) -> None:
    image = Image.fromarray(np.full((8, 6, 3), 128, np.uint8))
    assert np.abs(decode_image(saved(image, kind), "a").astype(int) - 128).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_only_on_request(kind: str, orientation: int) -> None:
    """Upright equals what the orientation's definition says: rows and columns by hand."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = 255  # the first quarter of the stored picture is white
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(pixels), kind, exif=exif.tobytes(), **({"quality": 95} if kind != "PNG" else {}))
    flips = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    flips |= {5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1), 8: np.rot90}
    flips[7] = lambda a: np.rot90(a.transpose(1, 0, 2), 2)
    upright, stored = decode_image(data, "a", upright=True), decode_image(data, "a")
    assert np.abs(stored.astype(int) - pixels).max() < 60
    assert upright.shape == flips[orientation](pixels).shape
    assert np.abs(upright.astype(int) - flips[orientation](pixels)).max() < 60


@pytest.mark.parametrize("kind", ["EPS", "GIF", "ICO", "PDF"])
def test_no_other_format_is_opened_under_any_name(kind: str) -> None:
    """Some of Pillow's formats start other programs (EPS)."""
    with pytest.raises(FastgenError, match=r"^a\.png: not a readable image"):
        decode_image(saved(Image.new("RGB", (16, 16)), kind), "a.png")
