"""Model cards of the embedded checkpoints: what was trained, how, on what, for how long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_record(folder: Path, part: str, record: dict[str, Any]) -> None:
    """Add the record of `part` ("vae", "transformer", …) to `folder/training.json`."""
    path = folder / "training.json"
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    records[part] = record
    _write(path, records)


def write_defaults(folder: Path, **defaults: float) -> None:
    """Write `folder/fastgen.json`: the settings that `fastgen generate` uses where the user gives none."""
    _write(folder / "fastgen.json", defaults)


def inherit_records(folder: Path, part: Path) -> None:
    """Copy the records of a part that was trained before (the folder above `part`) into `folder/training.json`."""
    path = part.parent / "training.json"
    if path.exists():
        for name, record in json.loads(path.read_text(encoding="utf-8")).items():
            write_record(folder, name, record)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
