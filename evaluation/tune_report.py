"""The plot and the contact sheet of `fastgen tune`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from fastgen.evaluation.tuning import Trial, front
from fastgen.io import atomic_write_bytes, encode_png

__all__ = ["contact_sheet", "plot"]

_GAP, _LABEL = 4, 16
_COLORS = {"exact": "#2a7de1", "fewer steps": "#8a8a8a", "other": "#d9722e"}


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> bytes:
    """Pictures of the same prompts and seeds, one row a plan, as a PNG.

    Args:
        rows: name of the plan, and its pictures.
    """
    width, height = rows[0][1][0].size
    columns = max(len(images) for _, images in rows)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, len(rows) * (height + _GAP + _LABEL) + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows):
        top = _GAP + row * (height + _GAP + _LABEL)
        pen.text((_GAP, top), name, fill="black")
        for column, image in enumerate(images):
            sheet.paste(image.convert("RGB"), (_GAP + column * (width + _GAP), top + _LABEL))
    return encode_png(sheet, {"Software": "fastgen"})


def plot(trials: Sequence[Trial], chosen: Trial, metric: str, path: Path) -> None:
    """Score against seconds of all plans, with the Pareto front named, as a PNG; needs matplotlib."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    best = front(trials)
    for kind in _COLORS:
        group = [trial for trial in trials if _kind(trial) == kind]
        if not group:
            continue
        ratios = [trial.ratio for trial in group]
        middle = [ratio[0] for ratio in ratios]
        errors = [[m - r[1] for m, r in zip(middle, ratios, strict=True)], [r[2] - r[0] for r in ratios]]
        half = [trial.drop[1] for trial in group]
        axes.errorbar(
            middle, [trial.score for trial in group], yerr=half, xerr=errors, fmt="o", ms=4, lw=0.7,
            color=_COLORS[kind], label=kind, alpha=0.8,
        )  # fmt: skip
    axes.plot([trial.ratio[0] for trial in best], [trial.score for trial in best], color="black", lw=0.8, zorder=0)
    for number, trial in enumerate(best, 1):
        place = (4, 5) if number % 2 else (4, -12)  # neighbours on the front are often close
        axes.annotate(str(number), (trial.ratio[0], trial.score), xytext=place, textcoords="offset points", fontsize=8)
    names = [f"{number}  {trial.name}" for number, trial in enumerate(best, 1)]
    axes.text(1.02, 0.0, "\n".join(names), transform=axes.transAxes, fontsize=7, va="bottom")
    axes.plot([chosen.ratio[0]], [chosen.score], "o", ms=11, mfc="none", mec="black", label="chosen")
    axes.set_xlabel("seconds a picture, stock = 1 (bars: 95 % intervals)")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130, metadata={"Software": "fastgen"})
    atomic_write_bytes(path, data.getvalue())


def _kind(trial: Trial) -> str:
    if trial.loss == "exact":
        return "exact"
    return "fewer steps" if trial.rival else "other"
