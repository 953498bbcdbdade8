"""What a model's configuration may hold: values of the types that the classes it builds say they take, and no number
so large that nothing can be built of it in bounded time and memory.

Every class of diffusers has a schema: the type hints of its arguments, or their defaults, which `huggingface_hub`
compares with values. Configurations of transformers check themselves.
"""

from __future__ import annotations

import collections.abc
import inspect
import math
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as shown
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator

from fastgen.errors import FastgenError

__all__ = ["check_arguments", "check_numbers", "check_plain"]

_LISTS = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable)
_NUMBER = int | float
_TUPLE: Any = tuple  # of types that are worked out
_UNION: Any = Union
# Numbers of these names may be negative whatever their default is: they count from an end, or stand for "none".
_SIGNED = re.compile(r"token|(^|_)id$|index|layer$|shift|mean|min|_start")
# Largest numbers by the first pattern that the key matches; far above any published model.
_LIMITS = (
    (re.compile(r"theta|_token|(^|_)id$|initializer|max_length|version|_scale"), math.inf),
    (re.compile(r"layers|blocks|depth|stages|repeats|experts"), 2**12),
    (re.compile(r"timesteps|steps|heads|multiplier"), 2**16),
    (re.compile(r"channels|_size$|width|height"), 2**20),
    (re.compile(""), 2**24),
)


def check_numbers(config: object, file: Path) -> None:
    """Refuse numbers of a configuration that are not finite or too large; the message names file, key and value."""
    for key, value in _numbers("", config):
        # The defaults of some schedulers are infinite; their class says which, where it is known.
        if not math.isfinite(value) and (file.name != "scheduler_config.json" or math.isnan(value)):
            raise FastgenError(f"{file}: {key} is {value}, needs a finite number")
        limit = next(limit for pattern, limit in _LIMITS if pattern.search(key))
        if math.isfinite(value) and abs(value) > limit:
            raise FastgenError(f"{file}: {key} is {value}, at most {limit} is allowed")


def check_arguments(config: Mapping[str, Any], kind: Any, file: Path) -> None:
    """Refuse values that the arguments of a class of diffusers or ours cannot take; keys that are no arguments are
    left to the library. The message names the file, the key, the value and what is allowed."""
    if not isinstance(config, Mapping):
        raise FastgenError(f"{file}: {shown(config)} is not allowed, needs a JSON object")
    hints = _hints(kind.__init__)
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        value, hint, default = config.get(name), hints.get(name, Any), parameter.default
        # Libraries write null for what is not set. A hint of None: it is worked out while the class is built.
        if value is None or parameter.kind is parameter.VAR_KEYWORD:
            continue
        whole = hint is int and type(default) is int
        if hint in (type(None), parameter.empty):
            hint = Any
        # Hints of libraries are not always right, defaults are.
        like = next((each for each in (bool, int, float, str, list, tuple, dict) if isinstance(default, each)), None)
        allowed = ([] if hint is Any else [_of_json(hint)]) + ([] if like is None or whole else [_of_default(default)])
        if allowed and not any(_fits(value, each) for each in allowed):
            needs = inspect.formatannotation(like if hint is Any else hint)
            raise FastgenError(f"{file}: {name} is {shown(value)}, needs {needs}")
        if _is_number(value):
            if not math.isfinite(value) and value != default:
                raise FastgenError(f"{file}: {name} is {value}, needs a finite number")
            if value < 0 and _is_number(default) and default >= 0 and not _SIGNED.search(name):
                raise FastgenError(f"{file}: {name} is {value}, needs a number >= 0")


def check_plain(name: str, value: Any, function: Any) -> None:
    """Refuse a number, text or list of such that an argument of `function` cannot take by its type hint, and numbers
    that are not finite; other values and other hints are left to the function."""
    flat = list(value) if isinstance(value, list | tuple) else [value]
    if value is None or not all(isinstance(each, str | int | float | None) for each in flat):
        return
    if any(isinstance(each, float) and not math.isfinite(each) for each in flat):
        raise FastgenError(f"{name}: {shown(value)} is not allowed, needs finite numbers")
    hint = _hints(function).get(name, Any)
    # Hints of diffusers say bool where a number does as well.
    if _is_plain(hint) and not (hint is bool and _is_number(value)) and not _fits(value, _of_json(hint)):
        raise FastgenError(f"{name}: {shown(value)} is not allowed, needs {inspect.formatannotation(hint)}")


def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except Exception:  # a name that only type checkers see
        given = inspect.signature(function).parameters.values()
        return {each.name: each.annotation for each in given if not isinstance(each.annotation, str)}


def _numbers(key: str, value: Any) -> Iterator[tuple[str, int | float]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(name, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(key, inner)
    elif _is_number(value):
        yield key, value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_plain(hint: Any) -> bool:
    """Whether a hint is made of numbers, texts and lists of them."""
    inner = [each for each in get_args(hint) if each is not Ellipsis]
    return hint in (bool, int, float, str, type(None)) or (bool(inner) and all(map(_is_plain, inner)))


def _fits(value: Any, hint: Any) -> bool:
    try:
        type_validator("", _frozen(value), hint)
    except TypeError:
        return False
    return True


def _frozen(value: Any) -> Any:
    """A value of JSON with tuples for lists and whole numbers for those that are written as floats."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _of_json(hint: Any) -> Any:
    """A type hint for the value of JSON, as `_frozen` returns it, that stands for a value of type `hint`."""
    origin, given = get_origin(hint), get_args(hint)
    bare = origin or hint
    if hint is Any or origin is Literal or bare in (bool, int, str, type(None)):
        return hint
    if bare is float:
        return _NUMBER
    inner = [_of_json(each) for each in given if each is not Ellipsis]
    if origin in (Union, types.UnionType):
        # A list may mix the kinds of lists that are allowed.
        members = tuple(get_args(each)[0] for each in inner if get_args(each)[1:] == (...,))
        return _UNION[tuple(inner + ([_TUPLE[_UNION[members], ...]] if members else []))]
    if bare in _LISTS:
        inner = [_UNION[each, None] for each in inner]
        # Libraries write tuple[int] for a tuple of any length.
        return _TUPLE[tuple(inner)] if len(inner) > 1 else _TUPLE[inner[0], ...] if inner else tuple
    if bare in (dict, collections.abc.Mapping):
        return dict
    # A class of the library's: what JSON holds in its place is text, a table or a list.
    return str | dict | tuple if isinstance(bare, type) else Any


def _of_default(value: Any) -> Any:
    """A type hint for values of a default's kind."""
    if isinstance(value, (list, tuple)):
        return _TUPLE[_of_default(value[0]), ...] if value else tuple
    if _is_number(value):
        return _NUMBER
    return str if isinstance(value, str) else type(value)
