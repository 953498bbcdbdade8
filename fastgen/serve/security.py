"""What every request passes: a size limit, the host and origin, the key, and headers of the answer."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from fastgen.serve.errors import ApiError, answer_of
from fastgen.serve.settings import ServeSettings, is_loopback

__all__ = ["Guard"]

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]

#: Everything of the page comes from this server.
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
#: What needs no key: the page, and what a load balancer asks.
_OPEN = ("/", "/healthz", "/readyz", "/openapi.json")


class Guard:
    """ASGI middleware.

    Args:
        app: what it guards.
        settings: key, host and limits.
        count: called with route and status of every answer.
    """

    def __init__(self, app: Any, settings: ServeSettings, count: Callable[[str, int], None]) -> None:
        self._app, self._settings, self._count = app, settings, count

    async def __call__(self, scope: MutableMapping[str, Any], receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}

        async def sent(message: _Message) -> None:
            if message["type"] == "http.response.start":
                known = {name.lower() for name, _ in message.get("headers", [])}
                added = [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in known]
                message["headers"] = [*message.get("headers", []), *added]
                route = getattr(scope.get("route"), "path", "other")
                self._count(route, message["status"])
            await send(message)

        error = self._refusal(scope, headers)
        if error is not None:
            await answer_of(error)(scope, receive, sent)
            return
        await self._app(scope, _Limited(receive, self._settings.limits.body), sent)

    def _refusal(self, scope: MutableMapping[str, Any], headers: dict[str, str]) -> ApiError | None:
        settings, path = self._settings, scope["path"]
        host = headers.get("host", "")
        # A page of another site can make a name of its own point here; its requests carry that name.
        if is_loopback(settings.host) and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return ApiError(421, "host: this server answers on this machine only", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and scope["method"] not in ("GET", "HEAD") and urlsplit(origin).netloc != host:
            return ApiError(403, "origin: pages of other sites may not draw here", code="wrong_origin")
        try:
            length = int(headers.get("content-length", 0))
        except ValueError:
            return ApiError(400, "content-length: not a number", code="invalid_value")
        if length > settings.limits.body:
            return too_large(settings.limits.body)
        if settings.api_key is None or path in _OPEN or path.startswith("/page/"):
            return None
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if kind.lower() == "bearer" else b""
        if not secrets.compare_digest(given, settings.api_key.encode()):
            wanted = {"WWW-Authenticate": "Bearer"}
            return ApiError(401, "no valid API key was given", code="invalid_api_key", headers=wanted)
        return None


class _Limited:
    """Counts the bytes that a client sends, independent of its headers."""

    def __init__(self, receive: _Receive, most: int) -> None:
        self._receive, self._left, self._most = receive, most, most

    async def __call__(self) -> _Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise too_large(self._most)
        return message


def too_large(most: int) -> ApiError:
    """The answer to a body above the limit."""
    return ApiError(413, f"the request has more than {most >> 20} MB", code="too_large")
