"""Names of acceptance rules, trees and windows, and limits on settings: everything that needs no torch."""

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

#: Acceptance rules by name, and those that keep the target's distribution.
RULES = ("exact", "block", "lantern", "lantern++", "gsd", "cool-sd", "cascade")
LOSSLESS = ("exact", "block")
#: Nodes at each depth of named trees, below the root; the two large ones are LANTERN's.
TREES = {"small": (2, 2, 1), "wide": (4, 2, 1), "lantern-25": (4, 8, 8, 3, 2), "lantern-57": (5, 13, 16, 14, 9)}
#: One token at a time, without drafting.
PLAIN = "plain"
#: Most tokens that a round verifies: its masks grow with the square.
MOST_NODES = 1024
#: A smaller divisor makes logits overflow, or amplifies their rounding.
SMALLEST_TEMPERATURE = 1e-6

_CHAIN = re.compile(r"chain-([1-9]\d{0,5})")
_WIDTHS = re.compile(r"[1-9]\d{0,5}(-[1-9]\d{0,5})*")
_WINDOW = re.compile(r"(?:jacobi|heads)-([1-9]\d{0,5})(?:x([1-9]\d{0,5})(?:-([1-9]\d{0,5}))?)?")


def check_temperature(label: str, value: object) -> float:
    """Check a temperature: 0 (the most likely token), or a divisor of the logits.

    Raises:
        FastgenError: not a number, or out of range.
    """
    temperature = check_number(label, value, 0)
    if 0 < temperature < SMALLEST_TEMPERATURE:
        raise FastgenError(
            f"{label}: {value!r} is not allowed, needs 0 (the most likely token) or at least {SMALLEST_TEMPERATURE:g}"
        )
    return temperature


def check_nodes(label: str, shown: object, nodes: int) -> None:
    """Check the number of nodes of a round.

    Raises:
        FastgenError: more than `MOST_NODES`.
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
    """Passes of a small network per round, by source name: one for heads, one per level for a drafter's tree."""
    return 1 if name.startswith("heads-") else len(tree_widths(name) or ())


def is_tree_name(name: str) -> bool:
    """Whether it names a tree ("chain-4", "4-2-1", "lantern-25"), a window ("jacobi-12", "jacobi-12x4",
    "heads-12x2-4"), or is "auto" or "plain"."""
    return name in ("auto", PLAIN) or tree_widths(name) is not None or _WINDOW.fullmatch(name) is not None


def check_tree_name(label: str, name: str) -> None:
    """Check the name and the size of a tree or window.

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
    """Parse a window's name: "jacobi-12" and "heads-12" have 12 places; "jacobi-12x4" has 4 candidates per place,
    "jacobi-12x4-3" has them at the first 3 places only.

    Returns:
        places, candidates per place, and the number of places with that many candidates.

    Raises:
        FastgenError: not a window's name, or a window that is too large.
    """
    found = _WINDOW.fullmatch(name)
    if found is None:
        raise FastgenError(f"{label}: {name!r} is not a window; use e.g. jacobi-12 or jacobi-12x4")
    window, width = int(found[1]), int(found[2] or 1)
    wide = int(found[3] or window)
    if wide > window:
        raise FastgenError(f"{label}: {name!r} has candidates at {wide} places, the window has {window}")
    check_nodes(label, name, window + (width - 1) * wide)
    return window, width, wide
