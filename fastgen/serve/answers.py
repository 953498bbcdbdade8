"""Bodies of answers, and finished pictures that are fetched by URL."""

from __future__ import annotations

import base64
import io
import secrets
import time
from collections import OrderedDict
from typing import Any

from PIL import Image
from pydantic import BaseModel

from fastgen.serve.orders import Drawn

__all__ = ["ImagesAnswer", "ModelAnswer", "ModelsAnswer", "Shelf", "answer", "encoded"]

_KEPT = 256  # finished pictures that can be fetched by their URL


class ImageAnswer(BaseModel):
    """A picture: `b64_json` or `url`; `fastgen` is the sidecar that `fastgen generate` would write."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    fastgen: dict[str, Any]


class ImagesAnswer(BaseModel):
    """Finished pictures."""

    created: int
    data: list[ImageAnswer]
    output_format: str
    size: str


class ModelAnswer(BaseModel):
    """A model that is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "fastgen"
    fastgen: dict[str, Any]


class ModelsAnswer(BaseModel):
    """All of them."""

    object: str = "list"
    data: list[ModelAnswer]


class Shelf:
    """The last pictures that were asked for by URL, under names that nobody can guess."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, tuple[bytes, str]] = OrderedDict()

    def put(self, data: bytes, kind: str) -> str:
        """Keep a file; its name."""
        name = f"{secrets.token_urlsafe(24)}.{kind}"
        self._files[name] = data, f"image/{kind}"
        while len(self._files) > _KEPT:
            self._files.popitem(last=False)
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """The file and its media type."""
        return self._files.get(name)


def encoded(png: bytes, kind: str, quality: int) -> bytes:
    """A PNG in the format that was asked for."""
    if kind == "png":
        return png
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.save(buffer, kind, quality=quality)
    return buffer.getvalue()


def answer(request: Any, drawn: list[Drawn], shelf: Shelf, base_url: str) -> dict[str, Any]:
    """The body for finished pictures."""
    data = [one(request, picture, shelf, base_url) for picture in drawn]
    return {
        "created": int(time.time()),
        "data": data,
        "output_format": request.output_format,
        "size": data[0]["fastgen"]["size"],
    }


def one(request: Any, drawn: Drawn, shelf: Shelf, base_url: str) -> dict[str, Any]:
    """The part of the body for one picture."""
    data = encoded(drawn.png, request.output_format, request.output_compression)
    details = {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in drawn.details.items()
    }
    record = {**drawn.record, **({"details": details} if details else {})}
    if request.response_format == "url":
        name = shelf.put(data, request.output_format)
        return {"url": f"{base_url}pictures/{name}", "fastgen": record}
    return {"b64_json": base64.b64encode(data).decode(), "fastgen": record}
