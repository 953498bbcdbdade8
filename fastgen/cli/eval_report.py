"""`fastgen eval report`: many results on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastgen.errors import FastgenError

_SUFFIXES = (".html", ".md", ".csv")


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
