"""Results as text: versions that made them, Markdown tables from result JSON, and contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont


def percent(value: float | None, digits: int = 1) -> str:
    """`value` in percent, or a dash."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns after the first are right-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def checker_markdown(data: dict[str, Any]) -> str:
    """The validation of the ShapesWorld checker (`validate_checker`) as a Markdown page."""
    clean = data["clean"]
    columns = ["images", "accuracy @0.3", "precision", "recall", "accuracy @0.9", "mean confidence", "ECE"]
    rows = [["none", *_checker_cells(clean)]]
    for row in data["rows"]:
        rows.append([f"{row['perturbation']} {row['level']:g} ({row['unit']})", *_checker_cells(row)])
    verdict = "reached" if data["passed"] else "MISSED"
    return (
        "# ShapesWorld checker\n\n"
        f"Object-level accuracy on {clean['images']} fresh renders with {clean['objects']} objects "
        f"(ShapesWorld seed {data['seed']}, all colour x shape pairs): **{percent(clean['0.3']['accuracy'], 2)} %** "
        f"at the 0.3 threshold, {percent(clean['0.9']['accuracy'], 2)} % at the 0.9 threshold of counting; "
        f"target {percent(data['target'], 0)} %: {verdict}.\n\n"
        + f"In {data['distractors']['images']} pictures of blobs and textures without any object it finds one in "
        f"{percent(data['distractors']['0.3'])} % at the 0.3 threshold, in {percent(data['distractors']['0.9'])} % at "
        "0.9.\n\n"
        + markdown_table(["perturbation", *columns], rows)
        + f"\nAll numbers in percent. {data['definitions']}\n"
        + _provenance(data)
    )


def _checker_cells(row: dict[str, Any]) -> list[str]:
    low, high = row["0.3"], row["0.9"]
    shares = (low["accuracy"], low["precision"], low["recall"], high["accuracy"], row["mean_confidence"], row["ece"])
    return [str(row["images"]), *(percent(share, 2) for share in shares)]


def scores_markdown(data: dict[str, Any]) -> str:
    """A ShapesWorld-GenEval result as a Markdown table with one row a task."""
    rows = [
        [tag, percent(task["score"]), percent(task["stderr"]), str(task["n_prompts"]), str(task["n_images"])]
        for tag, task in data["tasks"].items()
    ]
    rows.append(
        [
            f"**{data['benchmark']}** (mean of tasks)",
            f"**{percent(data['overall'])}**",
            percent(data["overall_stderr"]),
            str(data["n_prompts"]),
            str(data["n_images"]),
        ]
    )
    return markdown_table(["task", "correct %", "± s.e.", "prompts", "images"], rows) + _provenance(data)


def _provenance(data: dict[str, Any]) -> str:
    parts = [f"{name} {value}" for name, value in data.get("versions", {}).items()]
    if data.get("detector"):
        parts.append(f"detector {data['detector'][:8]}")
    return f"\n{', '.join(parts)}\n" if parts else ""


# --- contact sheet -----------------------------------------------------------------------------------------------

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
            that a small picture shows what it is.
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
