"""Parametrised tests whose default run takes some members of a kind, and whose slow run takes the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def long_tail(members: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Parameters of which only those of `fast` belong to the default run."""
    members = list(members)
    if missing := [one for one in fast if one not in members]:
        raise ValueError(f"long_tail: {missing} are none of {members}")
    return [one if one in fast else pytest.param(one, marks=pytest.mark.slow) for one in members]
