"""Parametrised tests whose default run takes some members of a kind, and whose slow run takes the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def long_tail(members: Iterable[Any], fast: Collection[Any], unpack: bool = False) -> list[Any]:
    """Parameters of which only those of `fast` belong to the default run.

    Args:
        members: one value each, or with `unpack` one tuple of values each.
        fast: some of them.
        unpack: the test takes the values of a tuple as arguments of their own.
    """
    members = list(members)
    if missing := [one for one in fast if one not in members]:
        raise ValueError(f"long_tail: {missing} are none of {members}")
    return [
        pytest.param(*(one if unpack else [one]), marks=() if one in fast else pytest.mark.slow) for one in members
    ]
