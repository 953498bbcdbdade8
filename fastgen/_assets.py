"""The embedded checkpoints: where they are and whether they are whole. A leaf.

``python -m fastgen._assets`` writes the checksums; a recipe that changes a checkpoint ends with it.
"""

from __future__ import annotations

import json
from pathlib import Path

from fastgen.io import atomic_write_bytes, file_sha256, read_object

ROOT = Path(__file__).resolve().parent / "assets"
CHECKSUMS = "checksums.json"  # {"tiny": {"unet/config.json": sha256, ...}, ...}


def names(root: Path = ROOT) -> list[str]:
    """Names of the embedded checkpoints, one folder each."""
    if not root.is_dir():
        return []
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its path relative to `folder` with forward slashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def size(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def problem(name: str, root: Path = ROOT) -> str | None:
    """What is wrong with the embedded checkpoint `name`, or None when every file is as it was published."""
    try:
        expected = read_object(root / CHECKSUMS).get(name)
    except (OSError, ValueError) as error:
        return f"no readable {CHECKSUMS} to compare with ({type(error).__name__})"
    if not isinstance(expected, dict):
        return f"{CHECKSUMS} does not list it"
    found = checksums(root / name)
    for verb, files in (
        ("missing", sorted(expected.keys() - found.keys())),
        ("not published", sorted(found.keys() - expected.keys())),
        ("changed", sorted(file for file in expected.keys() & found.keys() if expected[file] != found[file])),
    ):
        if files:
            return f"{verb}: {', '.join(files[:3])}{' …' if len(files) > 3 else ''}"
    return None


def write_checksums(root: Path = ROOT) -> Path:
    """Write the checksums of all embedded checkpoints to ``checksums.json`` and return its path."""
    path = root / CHECKSUMS
    text = json.dumps({name: checksums(root / name) for name in names(root)}, indent=1, sort_keys=True) + "\n"
    atomic_write_bytes(path, text.encode())
    return path


if __name__ == "__main__":
    write_checksums()
