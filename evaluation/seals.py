"""Seals in pictures of a run, which show that a picture is complete and what it was drawn for.

GenEval's layout has no place for a sidecar, so each picture of a run has a seal: a last text chunk with the sha256 of
all bytes before it and of what the picture was drawn for. The seal of a damaged, swapped or edited picture is invalid.
"""

from __future__ import annotations

import hashlib
import zlib

from PIL import Image

from fastgen.io import encode_png

__all__ = ["is_sealed", "sealed_png"]

_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_KEY = b"tEXtfastgen-seal\x00"


def sealed_png(image: Image.Image, identity: str) -> bytes:
    """`image` as PNG with its seal.

    Args:
        identity: what it was drawn for, e.g. prompt, seed and settings.
    """
    body = encode_png(image).removesuffix(_END)
    return body + _seal(body, identity) + _END


def is_sealed(data: bytes, identity: str) -> bool:
    """Whether `data` are the bytes that `sealed_png` returned for this identity."""
    length = len(_seal(b"", "")) + len(_END)
    body, tail = data[:-length], data[-length:]
    return tail == _seal(body, identity) + _END


def _seal(body: bytes, identity: str) -> bytes:
    digest = hashlib.sha256(hashlib.sha256(body).digest() + identity.encode("utf-8", "surrogatepass")).hexdigest()
    chunk = _KEY + digest.encode()
    return (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
