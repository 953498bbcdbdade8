"""Limits on the numbers in a model's configuration, so that building its networks ends in bounded time and memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgen.errors import FastgenError

__all__ = ["check_numbers"]

# The first pattern that the key matches; far above any published model.
_LIMITS = (
    (re.compile(r"theta|_token|(^|_)id$|initializer|max_length|version|_scale"), math.inf),
    (re.compile(r"layers|blocks|depth|stages|repeats|experts"), 2**12),
    (re.compile(r"timesteps|steps|heads|multiplier"), 2**16),
    (re.compile(r"channels|_size$|width|height"), 2**20),
    (re.compile(""), 2**24),
)


def check_numbers(config: object, file: Path) -> None:
    """Refuse numbers that are not finite, or so large that nothing of that size can be built.

    Args:
        config: of JSON.
        file: where it comes from, for the message.

    Raises:
        FastgenError: names the file, the key and the value.
    """
    for key, value in _numbers("", config):
        if not math.isfinite(value):
            # The defaults of some schedulers are infinite; their class says which, where it is known.
            if file.name == "scheduler_config.json" and not math.isnan(value):
                continue
            raise FastgenError(f"{file}: {key} is {value}, needs a finite number")
        limit = next(limit for pattern, limit in _LIMITS if pattern.search(key))
        if abs(value) > limit:
            raise FastgenError(f"{file}: {key} is {value}, at most {limit} is allowed")


def _numbers(key: str, value: Any) -> Iterator[tuple[str, int | float]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(name, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(key, inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value
