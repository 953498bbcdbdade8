"""Pieces of reports: percentages, Markdown tables, provenance, figures and contact sheets."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from fastgen.errors import FastgenError


def paired_cells(row: dict[str, Any], shown: bool) -> list[str]:
    """The cell of a row's "paired" difference in points, with its interval; none where the table does not show it."""
    if not (paired := row.get("paired")):
        return [""] * shown
    low, high = (100 * end for end in paired["ci"])
    return [f"{100 * paired['difference']:+.1f} ({low:+.1f} to {high:+.1f})"]


def percent(value: float | None, digits: int = 1) -> str:
    """`value` in percent, or a dash."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def three(values: dict[str, float], digits: int = 3) -> list[str]:
    """The 20th, 50th and 80th percentile as cells of a table."""
    return [f"{values[name]:.{digits}f}" for name in ("p20", "p50", "p80")]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns after the first are right-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def table_page(note: str, header: Sequence[str], rows: Sequence[Sequence[str]], data: dict[str, Any]) -> str:
    """A note, a table, and where its numbers come from."""
    return f"{note}{markdown_table(header, rows)}\n{provenance(data)}\n"


def scores_markdown(data: dict[str, Any]) -> str:
    """A GenEval result as a Markdown table with one row a task."""
    rows = [
        [plain(tag), percent(task["score"]), percent(task["stderr"]), str(task["n_prompts"]), str(task["n_images"])]
        for tag, task in data["tasks"].items()
    ]
    rows.append(
        [
            f"**{plain(data['benchmark'])}** (mean of tasks)",
            f"**{percent(data['overall'])}**",
            percent(data["overall_stderr"]),
            str(data["n_prompts"]),
            str(data["n_images"]),
        ]
    )
    return markdown_table(["task", "correct %", "± s.e.", "prompts", "images"], rows) + "\n" + provenance(data) + "\n"


def task_lines(report: dict[str, Any]) -> list[str]:
    """The scores of the tasks for people."""

    def row(name: str, score: float, stderr: float | None) -> str:
        error = "" if stderr is None else f" ± {stderr:.3f}"
        return f"  {name:<16}{score:.3f}{error}"

    lines = [f"{report['benchmark']}: {report['n_images']} images of {report['n_prompts']} prompts"]
    lines += [row(tag, task["score"], task["stderr"]) for tag, task in report["tasks"].items()]
    lines.append(row("mean of tasks", report["overall"], report["overall_stderr"]) + "  (standard error by prompt)")
    images, prompts = report["correct_images"], report["correct_prompts"]
    return [*lines, f"  correct images {images:.3f}, correct prompts {prompts:.3f}"]


def source_lines(report: dict[str, Any]) -> list[str]:
    """Where the scores come from and where they went, for people."""
    lines = []
    if report.get("seconds_per_image") is not None:
        lines.append(f"{report['seconds_per_image']:.3f} s per image on {report['settings']['device']}")
    lines.append(provenance(report))
    return lines + [f"{name}: {report[name]}" for name in ("images", "sheet", "results") if name in report]


def plain(text: str) -> str:
    """`text` for Markdown, shown as it is: no link, picture, tag, code, emphasis or new cell comes out of it."""
    line = " ".join(text.split())
    escaped = re.sub(r"[\\`*\[\]<>|~#!&]", lambda found: f"\\{found[0]}", line)
    # Underscores inside a word are no emphasis; "://" and "www." would become links by themselves.
    escaped = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", escaped)
    return re.sub(r"(?i)(:)(?=//)|(?<=www)(\.)|(@)", lambda found: f"\\{found[0]}", escaped)


def provenance(data: dict[str, Any]) -> str:
    """Device, versions, commit and date of a result, and the detector that judged it, in one line."""
    where = data["environment"]
    threads = f"{where['threads']} thread{'s' if where['threads'] != 1 else ''}"
    on_cpu = str(data.get("settings", {}).get("device", "")).startswith("cpu")
    parts = [("" if on_cpu else ", ".join(where["gpus"])) or f"{where['cpu']}, {threads}"]
    parts.append(", ".join(f"{name} {number}" for name, number in where["versions"].items()))
    parts.append(f"commit {where['commit']}")
    if data.get("detector"):
        name = f"={data['detector_name']}" if data.get("detector_name") else ""
        parts.append(f"detector{name} {data['detector'][:8]}")
    return "; ".join([*parts, where["date"]])


def figure_of(panels: int) -> tuple[Any, list[Any]]:
    """A figure with panels side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FastgenError("--plot: needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(4.5 * panels, 3.6), layout="constrained")
    return figure, list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])


def plot_scores(
    panel: Any, series: dict[str, list[dict[str, Any]]], cost: Callable[[dict[str, Any]], float], **style: Any
) -> None:
    """ShapesWorld-GenEval of rows in percent, with its standard error, against their cost; a colour a series."""
    for name, rows in series.items():
        scores, errors = ([100 * (row[key] or 0) for row in rows] for key in ("score", "stderr"))
        panel.errorbar([cost(row) for row in rows], scores, yerr=errors, marker="o", capsize=2, label=name, **style)
    panel.set_ylabel("ShapesWorld-GenEval (%)")
    panel.grid(alpha=0.3)


_GAP, _LINES = 6, 3


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    *,
    correct: Sequence[bool] | None = None,
    columns: int = 8,
    tile: int = 128,
) -> Image.Image:
    """Images in a grid, on white.

    Args:
        images: any sizes, at least one; each is fitted into a square of `tile` pixels. Enlarging repeats pixels, so
            that a small picture is recognisable.
        captions: a text under each image, up to three lines.
        correct: verdicts; a green or red bar under each image.
        columns: images in a row.
        tile: side of a cell in pixels.

    Raises:
        ValueError: no image, or captions or verdicts of another number.
    """
    for name, extra in (("captions", captions), ("correct", correct)):
        if extra is not None and len(extra) != len(images):
            raise ValueError(f"{name}: needs one per image ({len(images)}), got {len(extra)}")
    if not images or columns < 1 or tile < 1:
        raise ValueError(f"contact_sheet: needs images, columns and tile >= 1, got {len(images)}, {columns}, {tile}")
    font = ImageFont.load_default(10)
    line_height = 12
    below = (4 if correct is not None else 0) + (_LINES * line_height if captions is not None else 0)
    step_x, step_y = tile + _GAP, tile + below + _GAP
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        x, y = _GAP + index % columns * step_x, _GAP + index // columns * step_y
        scale = tile / max(image.size)
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        sheet.paste(image.convert("RGB").resize(size, how), (x, y))
        y += tile
        if correct is not None:
            draw.rectangle((x, y + 1, x + tile - 1, y + 3), fill="#1a9850" if correct[index] else "#d73027")
            y += 4
        for line in _wrap(captions[index], draw, font, tile) if captions is not None else ():
            draw.text((x, y), line, fill="black", font=font)
            y += line_height
    return sheet


def _wrap(text: str, draw: ImageDraw.ImageDraw, font: Any, width: int) -> list[str]:
    """`text` in at most three lines of `width` pixels; what does not fit is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:_LINES]
