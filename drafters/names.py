"""What needs no torch: names of acceptance rules, trees and windows, and the limits of what a user may ask for."""

from __future__ import annotations

import re

from fastgen.checks import check_number
from fastgen.errors import FastgenError

__all__ = [
    "LOSSLESS",
    "MOST_NODES",
    "PLAIN",
    "RULES",
    "TREES",
    "check_nodes",
    "check_temperature",
    "check_tree_name",
    "is_tree_name",
    "levels_of",
    "tree_widths",
    "window_of",
]

#: Acceptance rules by name, and those of them that keep the target's law.
RULES = ("exact", "block", "lantern", "lantern++", "gsd", "cool-sd", "cascade")
LOSSLESS = ("exact", "block")
#: Nodes at each depth of named trees, below the root; the two large ones have those that LANTERN publishes.
TREES = {"small": (2, 2, 1), "wide": (4, 2, 1), "lantern-25": (4, 8, 8, 3, 2), "lantern-57": (5, 13, 16, 14, 9)}
#: One token after the other: nothing is drafted.
PLAIN = "plain"
#: A round verifies no more tokens than this: its masks grow with the square.
MOST_NODES = 1024
#: Logits divided by less than this overflow, or leave nothing but their rounding.
SMALLEST_TEMPERATURE = 1e-6

_CHAIN = re.compile(r"chain-([1-9]\d{0,5})")
_WIDTHS = re.compile(r"[1-9]\d{0,5}(-[1-9]\d{0,5})*")
_WINDOW = re.compile(r"(?:jacobi|heads)-([1-9]\d{0,5})(?:x([1-9]\d{0,5})(?:-([1-9]\d{0,5}))?)?")


def check_temperature(label: str, value: object) -> float:
    """0 (the most likely token), or a number that logits can be divided by.

    Raises:
        FastgenError: it is none.
    """
    temperature = check_number(label, value, 0)
    if 0 < temperature < SMALLEST_TEMPERATURE:
        raise FastgenError(
            f"{label}: {value!r} is not allowed, needs 0 (the most likely token) or at least {SMALLEST_TEMPERATURE:g}"
        )
    return temperature


def check_nodes(label: str, shown: object, nodes: int) -> None:
    """Refuse more nodes than a round verifies.

    Raises:
        FastgenError: there are more than `MOST_NODES`.
    """
    if nodes > MOST_NODES:
        raise FastgenError(f"{label}: {shown!r} has {nodes:,} nodes, a round verifies at most {MOST_NODES:,}")


def tree_widths(name: str) -> tuple[int, ...] | None:
    """Nodes at each depth of a tree by name ("chain-4", "4-2-1", "lantern-25"); None for other names."""
    if name in TREES:
        return TREES[name]
    if found := _CHAIN.fullmatch(name):
        return (1,) * int(found[1])
    return tuple(map(int, name.split("-"))) if _WIDTHS.fullmatch(name) else None


def levels_of(name: str) -> int:
    """Passes of a small network in a round of a source by name: one for heads, one a level for a drafter's tree."""
    return 1 if name.startswith("heads-") else len(tree_widths(name) or ())


def is_tree_name(name: str) -> bool:
    """Whether it names a tree ("chain-4", "4-2-1", "lantern-25"), a window ("jacobi-12", "jacobi-12x4",
    "heads-12x2-4"), or is "auto" or "plain"."""
    return name in ("auto", PLAIN) or tree_widths(name) is not None or _WINDOW.fullmatch(name) is not None


def check_tree_name(label: str, name: str) -> None:
    """Refuse what is no name of a tree or window, and trees and windows that are too large.

    Raises:
        FastgenError: names the value and what is allowed.
    """
    if not is_tree_name(name):
        windows = ["jacobi-12", "jacobi-12x4", "jacobi-12x4-3", "heads-12"]
        allowed = ", ".join([*TREES, "chain-5", "4-2-1 (nodes at each depth)", *windows, "auto", PLAIN])
        raise FastgenError(f"{label}: {name!r} is unknown; there are {allowed}")
    if _WINDOW.fullmatch(name):
        window_of(name, label)
    check_nodes(label, name, sum(tree_widths(name) or ()))


def window_of(name: str, label: str = "tree") -> tuple[int, int, int]:
    """Places of the window "jacobi-12" or "heads-12"; candidates of a place: "jacobi-12x4" has 4; and how many places,
    from the first on, have as many: all, but in "jacobi-12x4-3" 3, of which the others have one.

    Raises:
        FastgenError: no such name, or a window that is too large.
    """
    found = _WINDOW.fullmatch(name)
    if found is None:
        raise FastgenError(f"{label}: {name!r} is no window; needs e.g. jacobi-12, or jacobi-12x4")
    window, width = int(found[1]), int(found[2] or 1)
    wide = int(found[3] or window)
    if wide > window:
        raise FastgenError(f"{label}: {name!r} has candidates at {wide} places, the window has {window}")
    check_nodes(label, name, window + (width - 1) * wide)
    return window, width, wide
