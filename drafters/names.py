"""Names that need no torch: acceptance rules, trees and windows."""

from __future__ import annotations

import re

__all__ = ["LOSSLESS", "RULES", "TREES", "is_tree_name", "window_of"]

#: Acceptance rules by name, and those of them that keep the target's law.
RULES = ("exact", "block", "lantern", "lantern++", "gsd", "cool-sd", "cascade")
LOSSLESS = ("exact", "block")
#: Nodes at each depth of named trees, below the root; the two large ones have those that LANTERN publishes.
TREES = {"small": (2, 2, 1), "wide": (4, 2, 1), "lantern-25": (4, 8, 8, 3, 2), "lantern-57": (5, 13, 16, 14, 9)}

_TREE = re.compile(r"(chain-)?[1-9]\d*|[1-9]\d*(-[1-9]\d*)+")
_WINDOW = re.compile(r"jacobi-([1-9]\d*)(?:x([1-9]\d*))?")


def is_tree_name(name: str) -> bool:
    """Whether it names a tree ("chain-4", "4-2-1", "lantern-25"), a window ("jacobi-12", "jacobi-12x4"), or is
    "auto"."""
    return name == "auto" or name in TREES or any(form.fullmatch(name) is not None for form in (_TREE, _WINDOW))


def window_of(name: str) -> tuple[int, int]:
    """Places of the window "jacobi-12", and candidates of each: "jacobi-12x4" has 4.

    Raises:
        ValueError: no such name.
    """
    found = _WINDOW.fullmatch(name)
    if found is None:
        raise ValueError(f"tree: {name!r} is no window; needs e.g. jacobi-12, or jacobi-12x4")
    return int(found[1]), int(found[2] or 1)
