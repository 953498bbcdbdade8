"""`fastgen eval`: scores of models and folders, and what compares and reports them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated

import typer

from fastgen.cli.eval_fid import fid
from fastgen.cli.eval_geneval import geneval
from fastgen.cli.eval_shapes import shapes
from fastgen.cli.publish import JsonOption
from fastgen.errors import FastgenError

app = typer.Typer(help="Score images and models.", no_args_is_help=True)

REGRESSION = 3
"""Exit status of a regression; 2 is a mistake in the call, as everywhere, e.g. results that do not compare."""
_SUFFIXES = (".html", ".md", ".csv")

# Pillow's warning of a large image; the readers refuse it, in one line.
warnings.filterwarnings("ignore", message="Image size .* exceeds limit")


@app.callback()
def _group() -> None:
    """Score images and models."""


app.command("shapes")(shapes)
app.command("geneval")(geneval)
app.command("fid")(fid)


@app.command("compare")
def compare(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="The baseline: scores.json or a result of eval fid.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="The result to judge.")],
    confidence: Annotated[
        float, typer.Option("--confidence", help="Confidence of all gated intervals together.")
    ] = 0.95,
    margin: Annotated[
        float, typer.Option("--margin", help="Allowed loss: 0.01 is one point of a score, one percent of a distance.")
    ] = 0.0,
    prove: Annotated[
        bool,
        typer.Option("--prove", help="Fail unless a loss beyond the margin can be excluded (non-inferiority)."),
    ] = False,
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", help="Number that decides; repeat; all. Default: the mean of tasks, or all distances."),
    ] = None,
    max_slowdown: Annotated[
        float | None, typer.Option("--max-slowdown", help="Fail when a picture takes this many times as long.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the comparison here as JSON.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Compare two results: exit status 0 without a regression, 3 with one, 2 when they do not compare."""
    from fastgen.evaluation.compare import compare as compare_results
    from fastgen.evaluation.measures import read_results
    from fastgen.io import atomic_write_json, check_writable

    first, second = read_results([a, b])
    found = compare_results(
        first, second, confidence=confidence, margin=margin, gates=gate, prove=prove, max_slowdown=max_slowdown
    )
    if out is not None:
        check_writable(out.parent)
        atomic_write_json(out, found.as_dict())
    typer.echo(json.dumps(found.as_dict()) if as_json else found.markdown())
    return REGRESSION if found.regressed else 0


@app.command("report")
def report(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULT.json ...", help="scores.json and other results of eval and bench.")
    ],
    out: Annotated[list[Path], typer.Option("--out", "-o", help="report.html, .md or .csv; repeat for several.")],
    title: Annotated[str, typer.Option("--title", help="Title of the page.")] = "Evaluation",
    images: Annotated[int, typer.Option("--images", help="Images shown of each result (HTML).")] = 48,
    pictures: Annotated[
        list[Path] | None,
        typer.Option(
            "--pictures",
            help="Folder of scored images that may be shown; repeat. Those below the folder of a result always may.",
        ),
    ] = None,
) -> None:
    """One self-contained page: tables, quality against time, images with their verdicts, failures first."""
    for path in out:
        if path.suffix.lower() not in _SUFFIXES:
            raise FastgenError(f"--out: {path} is not allowed, needs a name that ends in {', '.join(_SUFFIXES)}")
    if images < 0:
        raise FastgenError(f"--images: {images} is not allowed, needs an integer >= 0")
    for folder in pictures or ():
        if not folder.is_dir():
            raise FastgenError(f"--pictures: {folder}: no such folder")

    from fastgen.evaluation.measures import read_results
    from fastgen.evaluation.report_page import csv_text, html_page, markdown_text
    from fastgen.io import atomic_write_many, check_writable

    for path in out:
        check_writable(path.parent)
    found = read_results(results)
    if not any(result.measures or result.points for result in found):
        raise FastgenError(f"{', '.join(map(str, results))}: no numbers to report (scores, distances or variants)")
    makers = {
        ".html": lambda: html_page(found, title, images, pictures or ()),
        ".md": lambda: markdown_text(found, title),
        ".csv": lambda: csv_text(found),
    }
    atomic_write_many([(path, makers[path.suffix.lower()]().encode()) for path in out])
    for path in out:
        typer.echo(str(path))
