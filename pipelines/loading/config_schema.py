"""The schema of a configuration: what the class that it builds says of its own arguments.

Type hints, and where there are none the defaults, tell which kinds of values an argument takes; a default that is not
negative tells that no negative number makes sense. So every class of diffusers has a schema, and a new one needs
nothing here; configurations of transformers check themselves. Numbers too large for anything are refused before, by
`config_limits`.
"""

from __future__ import annotations

import collections.abc
import inspect
import math
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastgen.errors import FastgenError

__all__ = ["check_arguments", "check_plain"]

_LISTS = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable)
_DICTS = (dict, collections.abc.Mapping)
# Numbers of these names may be negative whatever their default is: they count from an end, or stand for "none".
_SIGNED = re.compile(r"token|(^|_)id$|index|layer$|shift|mean|min|_start")


def check_arguments(config: Mapping[str, Any], kind: Any, file: Path) -> None:
    """Refuse values that the arguments of `kind` cannot take; keys that are no arguments are left to the library.

    Args:
        config: of JSON.
        kind: of diffusers or ours: whatever is built of the configuration.
        file: where it comes from, for the message.

    Raises:
        FastgenError: names the file, the key, the value and what is allowed.
    """
    if not isinstance(config, Mapping):
        raise FastgenError(f"{file}: {_shown(config)} is not allowed, needs a JSON object")
    build = kind.__init__
    parameters = inspect.signature(build).parameters
    try:
        hints = get_type_hints(build)
    except Exception:  # a name that only type checkers see
        hints = {name: each.annotation for name, each in parameters.items() if not isinstance(each.annotation, str)}
    for name, parameter in parameters.items():
        if name not in config or name == "self" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        hint, default, value = hints.get(name, Any), parameter.default, config[name]
        if hint in (type(None), parameter.empty):  # it is worked out while the class is built
            hint = Any
        if not isinstance(default, (bool, int, float, str, list, tuple, dict)):
            default = None
        if not _allowed(value, hint, default):
            allowed = _written(hint) if hint is not Any else type(default).__name__
            raise FastgenError(f"{file}: {name} is {_shown(value)}, needs {allowed}")
        if _is_number(value):
            _check_range(name, value, default, file)


def check_plain(name: str, value: Any, function: Any) -> None:
    """Refuse a number, text or list of such that an argument of `function` cannot take by its type hint, and numbers
    that are not finite; other values and other hints are left to the function.

    Raises:
        FastgenError: names the argument, the value and what is allowed.
    """
    flat = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(each, str | int | float) or each is None for each in flat):
        return
    if any(isinstance(each, float) and not math.isfinite(each) for each in flat):
        raise FastgenError(f"{name}: {_shown(value)} is not allowed, needs finite numbers")
    try:
        hint = get_type_hints(function).get(name, Any)
    except Exception:  # a name that only type checkers see
        return
    given = list(value) if isinstance(value, tuple) else value
    # Hints of diffusers say bool where a number does as well.
    if value is not None and _is_plain(hint) and not (hint is bool and _is_number(value)) and not _fits(given, hint):
        raise FastgenError(f"{name}: {_shown(value)} is not allowed, needs {_written(hint)}")


def _is_plain(hint: Any) -> bool:
    """Whether a hint is made of numbers, texts and lists of them."""
    inner = [each for each in get_args(hint) if each is not Ellipsis]
    return hint in (bool, int, float, str, type(None)) or (bool(inner) and all(map(_is_plain, inner)))


def _allowed(value: Any, hint: Any, default: Any) -> bool:
    # No value is always allowed: libraries write it for what is not set.
    if value is None or (hint is Any and default is None):
        return True
    if hint is Any:
        return _resembles(value, default)
    # Hints of libraries are not always right, defaults are; but a whole number is one.
    return _fits(value, hint) or (not (hint is int and type(default) is int) and _resembles(value, default))


def _check_range(name: str, value: Any, default: Any, file: Path) -> None:
    if not math.isfinite(value) and value != default:
        raise FastgenError(f"{file}: {name} is {value}, needs a finite number")
    if value < 0 and _is_number(default) and default >= 0 and not _SIGNED.search(name):
        raise FastgenError(f"{file}: {name} is {value}, needs a number >= 0")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON can be of a type."""
    origin, inner = get_origin(hint), get_args(hint)
    if value is None or hint is Any or (origin is None and not isinstance(hint, type)):
        return True
    if origin in (Union, types.UnionType):
        endless = [kind for kind in inner if get_origin(kind) in _LISTS and get_args(kind)[1:] in ((), (...,))]
        members = [get_args(kind)[0] for kind in endless]
        mixed = isinstance(value, list) and members and all(any(_fits(x, kind) for kind in members) for x in value)
        return bool(mixed) or any(_fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    bare = origin or hint
    if bare in _LISTS:
        return isinstance(value, list) and _members_fit(value, bare, inner)
    if bare in _DICTS:
        return isinstance(value, dict)
    if bare is bool:
        return isinstance(value, bool)
    if bare is int:
        return _is_number(value) and (not math.isfinite(value) or value == int(value))
    if bare is float:
        return _is_number(value)
    if bare is str:
        return isinstance(value, str)
    if bare is type(None):
        return False
    # A class of the library's: what JSON holds in its place is text, a table or a list.
    return isinstance(value, (str, dict, list))


def _members_fit(value: list[Any], bare: Any, inner: tuple[Any, ...]) -> bool:
    if bare is tuple and len(inner) > 1 and inner[1] is not Ellipsis:
        return len(value) == len(inner) and all(map(_fits, value, inner))
    # Libraries write tuple[int] for a tuple of any length.
    return not inner or all(_fits(each, inner[0]) for each in value)


def _resembles(value: Any, default: Any) -> bool:
    """Whether a value is of the default's kind."""
    if default is None:
        return False
    if isinstance(default, (list, tuple)):
        return isinstance(value, list) and (not default or all(_resembles(each, default[0]) for each in value))
    if isinstance(default, (bool, int, float)):
        return isinstance(value, bool) if isinstance(default, bool) else _is_number(value)
    return isinstance(value, str if isinstance(default, str) else type(default))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _written(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
