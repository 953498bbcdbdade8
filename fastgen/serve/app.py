"""The routes: OpenAI's for images, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from importlib.resources import files
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from fastgen import __version__
from fastgen.serve.answers import ImagesAnswer, ModelAnswer, ModelsAnswer, Shelf, answer, one
from fastgen.serve.artist import Catalogue
from fastgen.serve.errors import ApiError, AsciiResponse, ErrorAnswer, answer_of
from fastgen.serve.metrics import Metrics
from fastgen.serve.orders import Drawn, Event, Order
from fastgen.serve.requests import EditRequest, ImageRequest
from fastgen.serve.security import Guard
from fastgen.serve.settings import ServeSettings

__all__ = ["Backend", "create_app"]

logger = logging.getLogger(__name__)
PAGE = str(files("fastgen.serve") / "page")
_STREAMED: dict[int | str, Any] = {200: {"content": {"text/event-stream": {}}}}  # with `stream`
_REFUSED: dict[int | str, Any] = {
    code: {"model": ErrorAnswer, "description": text}
    for code, text in {
        400: "A field is wrong.",
        401: "No valid API key.",
        403: "From a page of another site.",
        404: "No such model.",
        413: "Too large.",
        421: "Wrong host.",
        429: "The queue is full.",
        503: "The server is not ready, or shuts down.",
        504: "It took too long.",
    }.items()
}


class Backend(Protocol):
    """Who draws: a thread of this process, or replicas of a cluster."""

    def ready(self) -> bool:
        """Whether it can draw."""
        ...

    def draw(self, orders: Sequence[Order]) -> AsyncIterator[tuple[int, Event]]:
        """Events of the orders with their places; ends when each had its last. Closing it cancels what is left.

        Raises:
            ApiError: the orders are refused.
        """
        ...

    def close(self, *, now: bool = False) -> None:
        """Refuse what comes; what is in the making is finished, or stopped if `now`."""
        ...


def create_app(settings: ServeSettings, catalogue: Catalogue, backend: Backend, metrics: Metrics) -> FastAPI:
    """The application; the caller starts and stops the backend."""
    app = FastAPI(
        title="fastgen",
        version=__version__,
        docs_url=None,  # their pages load scripts from other hosts
        redoc_url=None,
        default_response_class=AsciiResponse,
    )
    _answer_errors(app)
    _add_drawing(app, settings, catalogue, backend)
    _add_models(app, catalogue)
    _add_health(app, backend, metrics)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    app.add_middleware(Guard, settings=settings, count=lambda route, code: metrics.requests.labels(route, code).inc())
    return app


def _add_drawing(app: FastAPI, settings: ServeSettings, catalogue: Catalogue, backend: Backend) -> None:
    """Routes that draw pictures, and the one that gives finished ones by URL."""
    shelf = Shelf()

    @app.post("/v1/images/generations", response_model=ImagesAnswer, responses=_STREAMED | _REFUSED)
    async def generations(asked: ImageRequest, request: Request) -> Any:
        """Pictures from a prompt."""
        return await respond(asked, catalogue.orders(asked), request)

    @app.post(
        "/v1/images/edits", response_model=ImagesAnswer, responses=_STREAMED | _REFUSED, openapi_extra=_form_schema()
    )
    async def edits(request: Request) -> Any:
        """Pictures that begin with an uploaded one."""
        asked, image, mask = await _read_form(request)
        return await respond(asked, catalogue.orders(asked, image, mask), request)

    @app.get("/pictures/{name}", responses={404: _REFUSED[404]}, response_class=Response)
    async def picture(name: str) -> Response:
        """A finished picture, for response_format url."""
        found = shelf.get(name)
        if found is None:
            raise ApiError(404, "there is no such picture, or not any more", "name", "not_found")
        return Response(found[0], media_type=found[1])

    async def respond(asked: Any, orders: list[Order], request: Request) -> Any:
        if settings.log_prompts:
            logger.info("%d x %r", len(orders), asked.prompt)
        events = backend.draw(orders)
        if not asked.stream:
            drawn = await _finished(events, len(orders), request, settings.timeout)
            return AsciiResponse(answer(asked, drawn, shelf, str(request.base_url)))
        first = await anext(events)  # refusals are answers, not events
        lines = _stream(first, events, asked, lambda p: one(asked, p, shelf, str(request.base_url)), settings.timeout)
        return StreamingResponse(lines, media_type="text/event-stream")


def _add_models(app: FastAPI, catalogue: Catalogue) -> None:
    """Routes that say what is served."""
    started = int(time.time())

    @app.get("/v1/models", responses={401: _REFUSED[401]})
    async def models() -> ModelsAnswer:
        """What is served."""
        return ModelsAnswer(data=[described(name) for name in catalogue.models])

    @app.get("/v1/models/{model:path}", responses={401: _REFUSED[401], 404: _REFUSED[404]})
    async def model(model: str) -> ModelAnswer:
        """One of them."""
        if model not in catalogue.models:
            raise ApiError(404, f"model: {ascii(model)} is not served here", "model", "model_not_found")
        return described(model)

    def described(name: str) -> ModelAnswer:
        return ModelAnswer(id=name, created=started, fastgen=catalogue.description(name))


def _add_health(app: FastAPI, backend: Backend, metrics: Metrics) -> None:
    """Routes for monitoring, and the page."""

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: _REFUSED[503]})
    async def readyz() -> dict[str, str]:
        """Whether it can draw."""
        if not backend.ready():
            raise ApiError(503, "models are being loaded", code="not_ready", headers={"Retry-After": "5"})
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(f"{PAGE}/index.html")


async def _finished(
    events: AsyncIterator[tuple[int, Event]], count: int, request: Request, timeout: float
) -> list[Drawn]:
    """All pictures of a request. When the client goes, or the time is over, what is left is cancelled."""
    found: dict[int, Drawn] = {}

    async def collect() -> None:
        async with aclosing(events) as running:  # type: ignore[type-var]
            async for place, event in running:
                if event.error is not None:
                    raise event.error
                if event.drawn is not None:
                    found[place] = event.drawn

    async def gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.1)

    work, client = asyncio.ensure_future(collect()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, client}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        elif client.done():
            raise ApiError(499, "the client has gone", code="cancelled")
        else:
            raise ApiError(504, f"not done after {timeout:g} seconds", code="timeout")
    finally:
        for task in (work, client):
            task.cancel()
        await asyncio.gather(work, client, return_exceptions=True)
    return [found[place] for place in range(count)]


async def _stream(
    first: tuple[int, Event],
    events: AsyncIterator[tuple[int, Event]],
    asked: Any,
    shown: Callable[[Drawn], dict[str, Any]],
    timeout: float,
) -> AsyncIterator[bytes]:
    """Server-sent events, as OpenAI names them; progress only on request."""
    partials: dict[int, int] = {}
    ends = time.monotonic() + timeout
    async with aclosing(events) as running:  # type: ignore[type-var]
        place, event = first
        while True:
            if line := _line(place, event, asked, shown, partials):
                yield line
            if event.error is not None:
                return
            try:
                place, event = await asyncio.wait_for(anext(running), max(0.0, ends - time.monotonic()))
            except StopAsyncIteration:
                return
            except asyncio.TimeoutError:
                yield _event("error", ApiError(504, f"not done after {timeout:g} seconds", code="timeout").body())
                return


def _line(
    place: int, event: Event, asked: Any, shown: Callable[[Drawn], dict[str, Any]], partials: dict[int, int]
) -> bytes | None:
    common = {"index": place, "created_at": int(time.time()), "output_format": asked.output_format}
    if event.error is not None:
        error = event.error if isinstance(event.error, ApiError) else ApiError(500, "failed", code="internal")
        return _event("error", error.body())
    if event.drawn is not None:
        whole = shown(event.drawn)
        size = whole["fastgen"]["size"]
        more = {"size": size, "quality": "auto", "background": "opaque", "usage": _NO_USAGE}
        return _event("image_generation.completed", {**common, **more, **whole})
    if event.score is not None and event.partial is not None:
        score = event.score if math.isfinite(event.score) else None
        return _event("fastgen.candidate", {**common, "score": score, "b64_json": _text(event.partial)})
    if event.partial is not None:
        number = partials[place] = partials.get(place, -1) + 1
        more = {"size": "auto", "quality": "auto", "background": "opaque"}
        body = {
            **common,
            **more,
            "output_format": "png",
            "partial_image_index": number,
            "b64_json": _text(event.partial),
        }
        return _event("image_generation.partial_image", body)
    if asked.progress:
        visits = {"visits": event.visits} if event.visits else {}
        return _event("fastgen.progress", {**common, "step": event.step, "steps": event.steps, **visits})
    return None


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


#: OpenAI bills by these.
_NO_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


def _event(kind: str, body: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **body})}\n\n".encode("ascii")


# ---- uploads ----


async def _read_form(request: Request) -> tuple[Any, bytes, bytes | None]:
    """Fields and files of an edit.

    Raises:
        ApiError: a field that is wrong or missing.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "content-type: needs multipart/form-data", "image", "invalid_value")
    uploads: dict[str, bytes] = {}
    fields: dict[str, Any] = {}
    async with request.form(max_files=2, max_fields=100) as form:
        for name, value in form.multi_items():
            key = name.removesuffix("[]")
            if key in uploads or key in fields:
                raise ApiError(400, f"{ascii(key)}: given twice", key, "invalid_value")
            if isinstance(value, UploadFile):
                if key not in ("image", "mask"):
                    raise ApiError(400, f"{ascii(key)}: is no file", key, "invalid_value")
                uploads[key] = await value.read()
            else:
                fields[key] = value
    if "image" not in uploads:
        raise ApiError(400, "image: needs a picture", "image", "invalid_value")
    try:
        asked = EditRequest.model_validate(fields, strict=False)
    except ValidationError as error:
        raise _explained(error.errors()) from error
    return asked, uploads["image"], uploads.get("mask")


def _form_schema() -> dict[str, Any]:
    schema = EditRequest.model_json_schema()
    binary = {"type": "string", "format": "binary"}
    schema["properties"] |= {"image": binary, "mask": binary}
    schema["required"] = [*schema.get("required", []), "image"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


# ---- errors ----


def _answer_errors(app: FastAPI) -> None:
    """Every answer that is not a success is an error object."""

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> AsciiResponse:
        return answer_of(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> AsciiResponse:
        return answer_of(_explained(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> AsciiResponse:
        if isinstance(error.__cause__, ApiError):  # a body above the limit ends its parser
            return answer_of(error.__cause__)
        headers = dict(error.headers or {})
        return answer_of(ApiError(error.status_code, str(error.detail), code="http", headers=headers))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> AsciiResponse:
        logger.error("a request failed", exc_info=error)
        return answer_of(ApiError(500, "the server failed; its log says why", code="internal"))


def _explained(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's findings."""
    found = errors[0]
    place = [str(part) for part in found["loc"] if part != "body"]
    name = place[0] if place else None
    text = str(found["msg"]).removeprefix("Value error, ")
    message = text if name is None or text.startswith(f"{name}:") else f"{name}: {text}"
    shown = ascii(message)[1:-1] if not message.isprintable() else message
    return ApiError(400, shown, name, "invalid_value")
