"""Bodies of requests: OpenAI's fields, and the settings of the methods from their one schema."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, create_model

from fastgen.pipelines.schema import SCHEMA, Rule, check_prompt
from fastgen.serve.errors import ApiError
from fastgen.serve.settings import Limits

__all__ = ["EditRequest", "ImageRequest", "check_limits", "size_of"]

_SIZE = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
#: OpenAI's words for how hard its own models try; they say nothing to ours.
_EFFORT = ("auto", "low", "medium", "high", "standard", "hd")


def _checked(name: str, rule: Rule) -> Any:
    """A field's type: as the schema of settings has it."""

    def check(value: Any) -> Any:
        rule.check(name, value)
        return value

    schema = rule.json_schema()
    if name == "quality":  # OpenAI has a field of that name
        kind: Any = float | Literal["auto", "low", "medium", "high", "standard", "hd"]
        schema = {"anyOf": [schema, {"type": "string", "enum": list(_EFFORT)}], "description": schema["description"]}

        def check_quality(value: Any) -> Any:
            return value if isinstance(value, str) else check(value)

        return Annotated[kind, AfterValidator(check_quality), WithJsonSchema(schema)]
    return Annotated[rule.kind, AfterValidator(check), WithJsonSchema(schema)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, AfterValidator(check_prompt)] = Field(min_length=1, description="What to draw.")
    model: str | None = Field(None, description="One of GET /v1/models; the first of them by default.")
    n: int = Field(1, ge=1, le=1000, description="Pictures.")
    size: str | None = Field(None, pattern=_SIZE, description="WIDTHxHEIGHT in pixels, or auto.")
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100, description="Quality of jpeg and webp.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int = Field(0, ge=0, le=3, description="Pictures under way, in a stream.")
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] | None = Field(None, description="Has no effect.")
    style: Literal["vivid", "natural"] | None = Field(None, description="Has no effect.")
    user: str | None = Field(None, max_length=512, description="Has no effect.")
    seed: int | None = Field(None, ge=0, lt=2**53, description="Picture i uses seed + i; random by default.")
    method: Literal["base", "dc", "speculative", "search"] | None = Field(
        None, description="How to draw; the model's own by default."
    )
    batch_invariant: bool = Field(False, description="Pixels do not depend on what else is drawn at the same time.")
    progress: bool = Field(False, description="Also stream how far the picture is.")
    details: bool = Field(False, description="Also answer with what the method did: map, tree or rounds.")


# `verifier` may name a folder, and no path of a request is opened.
_SETTINGS: dict[str, Any] = {
    name: (_checked(name, rule) | None, None) for name, rule in SCHEMA.items() if name != "verifier"
}
_strength: Any = Annotated[float, Field(gt=0, le=1, description="How much of the picture may change.")]
_fidelity: Any = Annotated[Literal["high", "low"], Field(description="Has no effect.")]
_EDIT: dict[str, Any] = {"strength": (_strength | None, None), "input_fidelity": (_fidelity | None, None)}
ImageRequest: Any = create_model("ImageRequest", __base__=_Asked, **_SETTINGS)
EditRequest: Any = create_model("EditRequest", __base__=ImageRequest, **_EDIT)


def size_of(request: Any) -> tuple[int | None, int | None]:
    """The requested height and width.

    Raises:
        ApiError: `size` and `height` or `width` say different things.
    """
    asked = request.height, request.width
    if request.size is None or request.size == "auto":
        return asked
    width, height = map(int, request.size.split("x"))
    if any(side is not None for side in asked) and asked != (height, width):
        raise ApiError(400, "size: does not go with height and width", "size", "invalid_value")
    return height, width


def check_limits(request: Any, limits: Limits) -> None:
    """Refuse more than the server allows for one request.

    Raises:
        ApiError: names the field, its value and the limit.
    """
    height, width = size_of(request)
    side = "size" if request.size else None
    for name, value, most in (
        ("n", request.n, limits.images),
        ("prompt", len(request.prompt), limits.prompt),
        ("negative_prompt", len(request.negative_prompt or ""), limits.prompt),
        (side or "height", height, limits.side),
        (side or "width", width, limits.side),
        ("steps", request.steps, limits.steps),
        ("max_nfe", request.max_nfe, limits.nfe),
    ):
        if value is not None and value > most:
            unit = " characters" if name.endswith("prompt") else ""
            raise ApiError(400, f"{name}: {value}{unit} not allowed, at most {most}", name, "above_limit")
    if request.partial_images and not request.stream:
        raise ApiError(400, "partial_images: needs stream", "partial_images", "invalid_value")
    if re.search(r"[\ud800-\udfff]", f"{request.user or ''}{request.model or ''}"):
        raise ApiError(400, "user, model: not text", "model", "invalid_value")
