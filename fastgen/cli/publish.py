"""What the commands of `fastgen bench` share: options, and how a result is published."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgen.errors import FastgenError

DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]
OutOption = Annotated[Path | None, typer.Option(help="JSON file to write.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]


def has_matplotlib() -> bool:
    """Whether plots can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def check_files(*files: Path | None, folder: Path | None = None, plot: Path | None = None) -> None:
    """Refuse files and a folder that cannot be written, and a plot that cannot be drawn, before anything is measured.

    Raises:
        FastgenError: of the first folder that is not writable; matplotlib is not installed.
    """
    from fastgen.io import check_writable

    if plot is not None and not has_matplotlib():
        raise FastgenError("--plot: needs matplotlib (python -m pip install matplotlib)")
    files = (*files, plot)
    if folder is not None:
        check_writable(folder, create=False)
    for file in files:
        if file is not None:
            if file.is_dir():
                raise FastgenError(f"{file}: is a folder, needs the name of a file")
            check_writable(file.parent)


def publish(
    result: dict[str, Any], out: Path | None, as_json: bool, table: str, notes: Sequence[str] | None = None
) -> None:
    """Write the JSON file, and print JSON or the table.

    Args:
        notes: what the user should know of the pictures; None where the benchmark draws none.
    """
    from fastgen.io import atomic_write_json

    if notes is not None:
        result = {**result, "notes": list(notes)}
    if out is not None:
        atomic_write_json(out, result)
    typer.echo(json.dumps(result) if as_json else table)


def report(line: str) -> None:
    """A line about what is being measured, on stderr."""
    typer.echo(line, err=True)
