"""A picture of a noise search: its candidates, their scores, and the path to the returned picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from fastgen.errors import FastgenError

__all__ = ["search_tree"]

_PATH, _FORCED, _TAU = "#c0392b", "#e67e22", "#1e8449"
_CHAINS = ("#4a6fa5", "#7d5ba6", "#3a9188", "#8c6d31", "#5b5b5b")


def search_tree(search: Mapping[str, Any], picture: Image.Image | None = None) -> Image.Image:
    """Every evaluation at its time and score, joined to the one that it was proposed from.

    The way to the returned picture is drawn thick. A node without a score is drawn at the height of the best one
    that came of it. Search over paths runs through the same times again; its nodes are drawn one after the other.

    Args:
        search: `SearchReport.as_dict()`, as in "search" of a sidecar. "taus", the thresholds at each
            time, and "verifier" may be missing.
        picture: shown next to the tree.

    Raises:
        FastgenError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FastgenError("search_tree: needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(9.0, 4.8), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 0.28), height_ratios=(1, 1))
    axes, side, below = (figure.add_subplot(grid[place]) for place in ((slice(None), 0), (0, 1), (1, 1)))
    side.set_axis_off()
    below.set_axis_off()
    if picture is not None:
        small = max(picture.size) < 256
        side.imshow(np.asarray(picture.convert("RGB")), interpolation="nearest" if small else "antialiased")
    _draw(axes, search)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda place: -handles[place].get_zorder())
    handles, labels = [handles[place] for place in order], [labels[place] for place in order]
    below.legend(handles, labels, loc="upper left", fontsize=8, frameon=False, borderaxespad=0.0)
    figure.suptitle(_cut(search["prompt"], 90), x=0.01, ha="left", fontsize=11)
    axes.set_title(_caption(search), loc="left", fontsize=8, color="#555555")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _draw(axes: Any, search: Mapping[str, Any]) -> None:
    many = len(search["trees"]) > 1
    for number, tree in enumerate(search["trees"]):
        if tree:
            name = f"chain {number + 1}" if many else "tried"
            _draw_chain(axes, search, number, _places(tree), _CHAINS[number % len(_CHAINS)], name)
    last = max((x for tree in search["trees"] for x, _ in _places(tree).values()), default=0)
    taus = [(index, tau) for index, tau in enumerate(search.get("taus") or ()) if tau is not None]
    if taus:
        x, y = zip(*taus, strict=True)
        axes.plot(x, y, "--", color=_TAU, linewidth=1.2, label="threshold", zorder=2)
    axes.set_xlabel("time index (0: pure noise)")
    axes.set_ylabel(f"score by {search['verifier']}" if search.get("verifier") else "score")
    axes.set_xlim(-0.4, last + 0.4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.2)
    for name in ("top", "right"):
        axes.spines[name].set_visible(False)


def _draw_chain(
    axes: Any, search: Mapping[str, Any], number: int, places: dict[int, tuple[int, float]], color: str, name: str
) -> None:
    from matplotlib.collections import LineCollection

    tree = search["trees"][number]
    edges = [(places[int(parent)], places[int(node)]) for node, parent, *_ in tree if parent >= 0]
    axes.add_collection(LineCollection(edges, colors=color, linewidths=0.7, alpha=0.3, zorder=1))
    scored = [places[int(row[0])] for row in tree if row[3] is not None and row[1] >= 0]
    axes.scatter(*_columns(scored), s=14, color=color, alpha=0.6, linewidths=0, label=name, zorder=3)
    first = [places[int(row[0])] for row in tree if row[1] < 0]
    # One entry in the legend for all chains.
    label = "start" if number == 0 else None
    axes.scatter(*_columns(first), s=30, marker="s", facecolors="white", edgecolors=color, label=label, zorder=4)
    if number == search["chain"]:
        path = [places[node] for node in search["path"]]
        axes.plot(
            *_columns(path), "-o", color=_PATH, linewidth=2.2, markersize=4, label="way to the picture", zorder=5
        )
        kind = "returned" if search["finished"] else "returned (a preview)"
        axes.scatter(*_columns(path[-1:]), s=150, marker="*", color=_PATH, label=kind, zorder=7)
    forced = [places[node] for node in _forced(search, number)]
    if forced:
        known = any(_forced(search, before) for before in range(number))
        label = None if known else "continued, not accepted"
        axes.scatter(*_columns(forced), s=70, marker="D", facecolors="none", edgecolors=_FORCED, label=label, zorder=6)


def _places(tree: list[list[Any]]) -> dict[int, tuple[int, float]]:
    """For each node its number of steps from its start, and its height."""
    depth: dict[int, int] = {}
    height: dict[int, float] = {}
    for node, parent, *_ in tree:
        depth[node] = depth[parent] + 1 if parent >= 0 else 0
    for node, parent, _, score, *_ in reversed(tree):
        if score is not None:
            height[node] = score
        if parent >= 0 and node in height:
            height[parent] = max(height.get(parent, -math.inf), height[node])
    # What a node itself scored goes before what came of it; the search above may have met its children first.
    height |= {node: score for node, _, _, score, *_ in tree if score is not None}
    lowest = min(height.values(), default=0.0)
    for node, parent, *_ in tree:
        height.setdefault(node, height.get(parent, lowest))
    return {node: (depth[node], height[node]) for node in depth}


def _forced(search: Mapping[str, Any], number: int) -> list[int]:
    """The nodes of a chain that were continued although nothing was accepted there."""
    tree = search["trees"][number]
    parents = {int(row[1]) for row in tree}
    ways = set(search["path"]) if number == search["chain"] else set()
    found = []
    for step, accepted in enumerate(search["accepted"][number]):
        rows = [row for row in tree if row[2] == step + 1]
        if not accepted and rows:
            # Nodes of the last time have no children: take the returned one, or the best.
            chosen = [row for row in rows if row[0] in parents] or [row for row in rows if row[0] in ways]
            best = max(rows, key=lambda row: -math.inf if row[3] is None else row[3])
            found.append(int((chosen or [best])[0][0]))
    return found


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _caption(search: Mapping[str, Any]) -> str:
    score = "no score" if search["score"] is None else f"score {search['score']:.3g}"
    parts = [search["policy"], score, f"{search['evaluations']} evaluations", f"{search['nfe']} NFE"]
    if any(search["accepted"]):
        parts.append(f"{search['forced']} forced")
    return _cut(" · ".join([*parts, search["stopped"]]), 120)


def _cut(text: str, most: int) -> str:
    """One line of at most `most` characters."""
    line = " ".join(text.split())
    # A dollar sign would begin a formula.
    return (line if len(line) <= most else line[: most - 1] + "…").replace("$", r"\$")
