"""How many samples are worked on together: as many as free memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

__all__ = ["Fit", "fitting"]

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Fit:
    """Measurements of one kind of work.

    Attributes:
        rows: the most that fit; None: no limit was met.
    """

    rows: int | None = None


def fitting(part: Sequence[T], fit: Fit, work: Callable[[Sequence[T]], R]) -> list[R]:
    """Work on all rows together, or on halves where memory does not suffice; what fits is remembered.

    Raises:
        torch.OutOfMemoryError: a single row does not fit.
    """
    size = len(part) if fit.rows is None else min(fit.rows, len(part))
    done: list[R] = []
    first = 0
    while first < len(part):
        try:
            done.append(work(part[first : first + size]))
            first += size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = fit.rows = size // 2
        else:
            continue
        if torch.cuda.is_available():  # outside the handler, which holds the tensors of the call that failed
            torch.cuda.empty_cache()
    return done
