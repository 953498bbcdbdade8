"""The methods of drawing that `fastgen generate` and `fastgen eval` offer, and what each asks of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastgen.errors import FastgenError

if TYPE_CHECKING:
    from fastgen.pipelines.checkpoint import Checkpoint

__all__ = ["METHODS", "check_method", "check_method_name"]

#: Methods, each with the embedded model that it takes by default.
METHODS = {"base": "tiny", "dc": "tiny-dc", "speculative": "tiny-janus", "search": "tiny"}


def check_method_name(method: str | None) -> None:
    """FastgenError when there is no such method; None leaves the choice to the model."""
    if method is not None and method not in METHODS:
        raise FastgenError(f"--method: {method!r} is not allowed, needs one of {', '.join(METHODS)}")


def check_method(method: str | None, checkpoint: Checkpoint) -> None:
    """FastgenError when the model cannot draw by `method`; what decoding needs is looked for where it is loaded."""
    model, is_chunked = checkpoint.model, checkpoint.has_dynamic_chunking
    if method in ("base", "dc") and (method == "dc") != is_chunked:
        raise FastgenError(f"--method {method}: model {model!r} has {'' if is_chunked else 'no '}dynamic chunking")
    if method == "search" and checkpoint.kind == "janus":
        raise FastgenError(f"--method search: model {model!r} draws tokens, there is no noise to search")
