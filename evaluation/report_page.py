"""One page of many results: tables, quality against time, and images with their verdicts; as HTML, Markdown or CSV."""

from __future__ import annotations

import base64
import csv
import datetime
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.verdict_files import read_results as read_verdicts
from fastgen.evaluation.images import MAX_FILE_BYTES, decode_image
from fastgen.evaluation.measures import OVERALL, Measure, Point, Result
from fastgen.evaluation.plots import legend, quality_plot
from fastgen.evaluation.report import markdown_table, plain, provenance
from fastgen.io import read_limited

THUMBNAIL = 256
_CORRECT = ("correct_images", "correct_prompts")
_PIXELATED = 96  # pictures up to this size are shown enlarged, pixel by pixel


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table; the best of its column is marked."""

    text: str
    best: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Results of one benchmark side by side."""

    title: str
    header: list[str]
    rows: list[list[Cell]]
    notes: list[str]

    def markdown(self) -> str:
        """The table with its title and notes."""
        cells = [[(plain(cell.text), cell.best) for cell in row] for row in self.rows]
        rows = [[f"**{text}**" if best else text for text, best in row] for row in cells]
        notes = "".join(f"\n{plain(note)}\n" for note in self.notes)
        return f"## {plain(self.title)}\n\n{markdown_table([plain(name) for name in self.header], rows)}{notes}"


def tables_of(results: Sequence[Result]) -> list[Table]:
    """One table for every benchmark and detector, columns in order of first appearance."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.measures:
            title = result.benchmark + (f", {result.detector}" if result.detector else "")
            groups.setdefault(title, []).append(result)
    return [_table(title, members) for title, members in groups.items()]


def _table(title: str, members: Sequence[Result]) -> Table:
    names = list(dict.fromkeys(measure.name for result in members for measure in result.measures))
    judged = all("tasks" in result.data for result in members)
    timed = any(result.seconds is not None for result in members)
    best = {name: _best([found for result in members if (found := result.measure(name))]) for name in names}
    rows = []
    for result in members:
        cells = [Cell(result.name)]
        for name in names:
            found = result.measure(name)
            marked = found is not None and len(members) > 1 and found.value == best[name]
            cells.append(Cell("" if found is None else _text(found), marked))
        cells += [Cell(f"{100 * result.data[key]:.1f}") for key in _CORRECT if judged]
        cells.append(Cell(str(result.data.get("n_images", ""))))
        if timed:
            cells.append(Cell("" if result.seconds is None else f"{result.seconds:.3f}"))
        rows.append(cells)
    header = ["", *("mean of tasks" if name == OVERALL else name for name in names)]
    header += ["correct images", "correct prompts"] * judged + ["images"]
    return Table(title, header + ["s/image"] * timed, rows, [note for result in members for note in _notes(result)])


def _best(measures: Sequence[Measure]) -> float:
    values = [measure.value for measure in measures]
    return max(values) if measures[0].higher else min(values)


def _text(measure: Measure) -> str:
    if measure.interval is not None:
        return "{:.3f} ({:.3f} … {:.3f})".format(measure.value, *measure.interval)
    return measure.text()


def _notes(result: Result) -> list[str]:
    """The reason why a result cannot be compared with others."""
    data, notes = result.data, []
    if data.get("partial"):
        notes.append(f"{result.name} is partial: {data['partial']}.")
    if data.get("differs"):
        notes.append(f"{result.name} departs from the official protocol: {data['differs']}.")
    if "self_test" in data and data["self_test"] is None:
        notes.append(f"{result.name}: the detector was not tested before.")
    return notes


def csv_text(results: Sequence[Result]) -> str:
    """All numbers, one a row."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["result", "benchmark", "detector", "measure", "value", "stderr", "ci95_low", "ci95_high", "better", "images",
         "seconds_per_image", "file"]
    )  # fmt: skip
    for result in results:
        detector, images = result.detector.removeprefix("detector="), result.data.get("n_images")
        for item in result.measures:
            low, high = item.interval or (None, None)
            better = "higher" if item.higher else "lower"
            row = [result.name, result.benchmark, detector, item.name, item.value, item.stderr, low, high, better]
            writer.writerow(map(_cell, [*row, images, result.seconds, str(result.path)]))
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    """A spreadsheet computes a text that begins as a formula does; an apostrophe before it keeps it a text."""
    return f"'{value}" if isinstance(value, str) and value.lstrip()[:1] in tuple("=+-@") else value


def markdown_text(results: Sequence[Result], title: str) -> str:
    """Title, tables, quality against time, and provenance."""
    parts = [f"# {plain(title)}\n", *(table.markdown() for table in tables_of(results))]
    points = [point for result in results for point in result.points]
    if points:
        rows = [
            [
                *map(plain, (point.series, point.name)),
                f"{point.seconds:.3f}",
                *map(_percent, (point.score, point.stderr)),
            ]
            for point in sorted(points, key=lambda point: (point.series, point.seconds))
        ]
        table = markdown_table(["series", "result", "s/image", "score %", "± s.e."], rows)
        parts.append(f"## Quality against time\n\n{table}")
    lines = [f"- {plain(result.name)}: {plain(_provenance(result))}" for result in results]
    return "\n".join([*parts, "## Where the numbers come from\n", *lines, ""])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _provenance(result: Result) -> str:
    return provenance(result.data) if result.data.get("environment") else str(result.path)


# --- images ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shown:
    """An image with its verdict; `source` is a data URI, or "" with a `problem`."""

    tag: str
    prompt: str
    correct: bool
    reason: str
    source: str
    small: bool
    problem: str


@dataclass(frozen=True, slots=True)
class Grid:
    """Some images of a result."""

    title: str
    note: str
    items: list[Shown]


def grid_of(result: Result, count: int, folders: Sequence[Path] = ()) -> Grid | None:
    """Up to `count` images of a result, failures first, spread over the tasks; None when it has no verdicts.

    A result file may come from anybody, and names files: only images below its own folder are shown, or below one of
    `folders`, wherever links lead. Verdicts lie in results.jsonl next to the result or in the folder of the images.

    Args:
        folders: further folders whose images may be shown.

    Raises:
        FastgenError: the file of verdicts is damaged.
    """
    here = result.path.parent
    allowed = [folder.resolve() for folder in (here, *folders)]
    named = Path(str(result.data.get("images") or here))
    # The folder may have moved together with its result.
    roots = [root for root in (named, here) if _below(root, allowed)]
    places = [folder / "results.jsonl" for folder in (here, *roots)]
    file = next((path for path in places if path.is_file() and _below(path, allowed)), None)
    if file is None or "tasks" not in result.data or count < 1:
        return None
    verdicts = read_verdicts(file)
    order = _failures_first([(found.tag, found.correct) for found in verdicts.results])
    wrong = sum(not found.correct for found in verdicts.results)
    items = []
    for place in order[:count]:
        found, prompt = verdicts.results[place], verdicts.prompts[place]
        source, small, problem = _thumbnail([named, *roots], verdicts.names[place], allowed)
        items.append(Shown(found.tag, prompt.prompt, found.correct, found.reason, source, small, problem))
    note = f"{wrong} of {len(verdicts.results)} images are wrong; {len(items)} are shown, {result.detector}"
    return Grid(result.name, note, items)


def _below(path: Path, allowed: Sequence[Path]) -> bool:
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name with a null character
        return False
    return any(real == folder or folder in real.parents for folder in allowed)


def _failures_first(verdicts: Sequence[tuple[str, bool]]) -> list[int]:
    """Indices, wrong ones before correct ones, tasks taking turns."""
    turns: dict[tuple[bool, str], int] = {}
    keys = []
    for index, (tag, correct) in enumerate(verdicts):
        turn = turns[correct, tag] = turns.get((correct, tag), -1) + 1
        keys.append((correct, turn, index))
    return [index for _, _, index in sorted(keys)]


def _thumbnail(roots: Sequence[Path], name: str, allowed: Sequence[Path]) -> tuple[str, bool, str]:
    """(data URI, whether it is small, problem)."""
    places = [root / name for root in roots] + [Path(name)]
    path = next((place for place in places if _below(place, allowed) and place.is_file()), None)
    if path is None:
        if not _below(places[0], allowed):
            return "", False, f"{name} is not below the folder of its result; --pictures allows other folders"
        return "", False, f"{name} is gone"
    try:
        image = Image.fromarray(decode_image(read_limited(path, MAX_FILE_BYTES), name, upright=True))
    except FastgenError as error:
        return "", False, str(error)
    small = max(image.size) <= _PIXELATED
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", small, ""


# --- page --------------------------------------------------------------------------------------------------------


def html_page(
    results: Sequence[Result], title: str = "Evaluation", images: int = 48, folders: Sequence[Path] = ()
) -> str:
    """The page, self-contained.

    Args:
        images: shown of each result.
        folders: images below them may be shown, besides those below the folder of each result.

    Raises:
        FastgenError: jinja2 is not installed, or a file of verdicts is damaged.
    """
    try:
        import jinja2
    except ImportError as error:
        raise FastgenError("the HTML report needs jinja2: pip install jinja2") from error
    loader = jinja2.PackageLoader("fastgen.evaluation")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    grids = [grid for result in results if (grid := grid_of(result, images, folders)) is not None]
    tags = dict.fromkeys(item.tag for grid in grids for item in grid.items)
    return environment.get_template("report.html.jinja").render(
        title=title,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        tables=tables_of(results),
        plots=_plots(results),
        grids=grids,
        tags=list(tags),
        results=[
            {"name": result.name, "provenance": _provenance(result), "json": _readable(result.data)}
            for result in results
        ],
        problems=[
            f"{result.name} ({result.benchmark}) has no numbers that this page knows."
            for result in results
            if not result.measures and not result.points
        ],
    )


def _plots(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Whole results of a benchmark share a plot; every benchmark of variants has its own."""
    groups: dict[str, list[Point]] = {}
    for result in results:
        groups.setdefault(result.benchmark if result.measures else result.name, []).extend(result.points)
    return [
        {"title": title, "svg": quality_plot(points, "score"), "legend": legend(points)}
        for title, points in groups.items()
        if points
    ]


def _readable(data: dict[str, Any]) -> str:
    """The result without its long tables."""
    return json.dumps({key: value for key, value in data.items() if key not in ("prompts", "rows")}, indent=2)
