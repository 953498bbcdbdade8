"""Errors as OpenAI's clients expect them: an object with message, type, param and code."""

from __future__ import annotations

import json
import re
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

__all__ = ["ApiError", "AsciiResponse", "ErrorAnswer", "answer_of", "from_message"]


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorBody


class AsciiResponse(JSONResponse):
    """JSON in ASCII: a text that is echoed may contain what UTF-8 cannot encode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class ApiError(Exception):
    """An answer that is not a success.

    Args:
        status: of HTTP.
        message: one line.
        param: the field that it is about.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def __reduce__(self) -> Any:  # between the processes of a cluster
        return type(self), (self.status, self.message, self.param, self.code, self.headers)

    def body(self) -> dict[str, Any]:
        """For the answer, or for an event of a stream."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def answer_of(error: ApiError) -> AsciiResponse:
    """The answer for an error."""
    return AsciiResponse(error.body(), error.status, headers=error.headers)


def from_message(error: Exception) -> ApiError:
    """Of an error for the user ("steps: 0 is not allowed, …"): the field is the text before the colon."""
    message = " ".join(str(error).split())
    found = re.match(r"(?:--)?([a-z][a-z0-9_-]*)(?: \S+)?: ", message)
    return ApiError(400, message, found and found[1].replace("-", "_"), "invalid_value")
