"""Parts that change the arguments of a pipeline's call, or need to know which step it is at."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from fastgen.pipelines.accelerate.part import denoising_network
from fastgen.pipelines.stock_arguments import defaults_of

__all__ = ["Change", "Encode", "Progress", "change_calls", "change_encoding", "progress", "takes"]

Change = Callable[[dict[str, Any]], None]
"""Changes the arguments of a call, by name, in place; those that the user left out are not among them."""

Encode = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Takes the place of `encode_prompt`: gets the stock method, positional and named arguments."""


@dataclass
class Progress:
    """Passes of the denoiser that a call has made so far, its steps, and its guidance scale."""

    steps: int
    guidance_scale: float
    passes: int = 0


progress: ContextVar[Progress | None] = ContextVar("progress", default=None)
"""Of the call that this thread is in."""

_changes: weakref.WeakKeyDictionary[Any, list[Change]] = weakref.WeakKeyDictionary()
_encoders: weakref.WeakKeyDictionary[Any, Encode] = weakref.WeakKeyDictionary()


def takes(pipe: Any, name: str) -> bool:
    """Whether the pipeline's call has an argument of that name."""
    return name in inspect.signature(type(pipe).__call__).parameters


def change_calls(pipe: Any, change: Change) -> Callable[[], None]:
    """Let every later call of this pipeline pass through `change`; returns what takes that back."""
    _intercept(pipe)
    _changes.setdefault(pipe, []).append(change)

    def undo() -> None:
        _changes[pipe].remove(change)
        if not _changes[pipe]:
            del _changes[pipe]
        _release(pipe)

    return undo


def change_encoding(pipe: Any, encode: Encode) -> Callable[[], None]:
    """Let `encode` do what `encode_prompt` of this pipeline does; returns what takes that back."""
    _intercept(pipe)
    _encoders[pipe] = encode

    def undo() -> None:
        del _encoders[pipe]
        _release(pipe)

    return undo


def _intercept(pipe: Any) -> None:
    """The object gets a class of its own below its class, which differs in a few methods.

    Python looks `__call__` up on the class. Name and module stay, so that `save_pretrained` writes what it wrote.
    """
    if pipe not in _changes and pipe not in _encoders:
        stock: Any = type(pipe)
        pipe.__class__ = _subclass(stock)


def _release(pipe: Any) -> None:
    if pipe not in _changes and pipe not in _encoders:
        pipe.__class__ = type(pipe).__mro__[1]


def _plain(stock: Any, state: dict[str, Any]) -> Any:
    made = stock.__new__(stock)
    getattr(made, "__setstate__", vars(made).update)(state)
    return made


@functools.cache
def _subclass(stock: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    signature = inspect.signature(stock.__call__)
    defaults = {name: defaults_of(stock).get(name) for name in ("num_inference_steps", "guidance_scale")}

    @functools.wraps(stock.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        given = {name: value for name, value in bound.items() if name != "self"}
        rest = [name for name, each in signature.parameters.items() if each.kind is each.VAR_KEYWORD]
        given |= {name: value for each in rest for name, value in given.pop(each, {}).items()}
        for change in _changes.get(self, ()):
            change(given)
        asked = (given.get(name, default) for name, default in defaults.items())
        steps, scale = (each if isinstance(each, int | float) else 0 for each in asked)
        token = progress.set(Progress(int(steps), scale))
        try:
            return stock.__call__(self, **given)
        finally:
            progress.reset(token)

    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        whole = functools.partial(stock.encode_prompt, self)
        return _encoders[self](whole, args, kwargs) if self in _encoders else whole(*args, **kwargs)

    def device(self: Any) -> Any:  # text encoders may wait elsewhere
        return denoising_network(self).device if self in _encoders else stock.device.fget(self)

    def reduced(self: Any, protocol: Any) -> Any:  # a copy is a plain one: the changes belong to this object
        return _plain, (stock, getattr(self, "__getstate__", lambda: vars(self))())

    changed: dict[str, Any] = {
        "__call__": call,
        "__reduce_ex__": reduced,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "device": property(device),
    }
    if hasattr(stock, "encode_prompt"):
        changed["encode_prompt"] = functools.wraps(stock.encode_prompt)(encode_prompt)
    return type(stock.__name__, (stock,), changed)
