"""How a benchmark tells its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer


def publish(result: dict[str, Any], out: Path | None, as_json: bool, table: str) -> None:
    """Write the JSON file, and print JSON or the table."""
    from fastgen.io import atomic_write_json

    if out is not None:
        atomic_write_json(out, result)
    typer.echo(json.dumps(result) if as_json else table)
