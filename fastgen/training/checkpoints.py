"""Checkpoint and log of a training run: written atomically, verified when read, resumed with equal settings only."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastgen.errors import FastgenError
from fastgen.io import atomic_write_bytes, parse_json

__all__ = [
    "check_resumable",
    "check_run",
    "damaged",
    "file_version",
    "read_checkpoint",
    "trim_log",
    "write_checkpoint",
]


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint atomically: it is renamed after it is on disk."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote.

    Raises:
        FastgenError: it cannot be read, or one of its checksums is wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (member := archive.testzip()) is not None:  # torch.load does not verify checksums
                raise ValueError(f"the checksum of {member} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, torch and pickle raise errors of a dozen types
        raise damaged(path, error) from error
    if not isinstance(state, dict):
        raise damaged(path, ValueError(f"it holds a {type(state).__name__}"))
    return state


def damaged(path: Path, error: Exception) -> FastgenError:
    """A one-line error for a broken checkpoint."""
    line = (str(error).strip().splitlines() or [""])[0]
    return FastgenError(f"checkpoint {path} is damaged or of another model: {type(error).__name__}: {line}")


def check_resumable(path: Path, recipe: str, seed: int, settings: dict[str, Any]) -> None:
    """Run `check_run` on a checkpoint, if there is one, without comparing the data and before anything is loaded.

    Raises:
        FastgenError: it belongs to another run, or cannot be read.
    """
    if not path.exists():
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check_run(path, state, recipe, seed, settings, ("data",))
    except FastgenError:
        raise
    except Exception as error:  # zipfile, torch and pickle raise errors of a dozen types
        raise damaged(path, error) from error


def check_run(
    path: Path, state: dict[str, Any], recipe: str, seed: int, settings: dict[str, Any], but: tuple[str, ...] = ()
) -> None:
    """Refuse a checkpoint of another run.

    Args:
        settings: everything that this run's weights depend on, JSON-ready. Checkpoints of older versions have none.
        but: settings to skip.

    Raises:
        FastgenError: names the differences.
    """
    if state["recipe"] != recipe or state["seed"] != seed:
        raise FastgenError(
            f"{path} belongs to recipe {state['recipe']!r} with seed {state['seed']}; choose another output folder"
        )
    wanted = json.loads(json.dumps(settings))
    held = parse_json(state["settings"], path) if "settings" in state else wanted
    changed = [
        f"{name} is {held.get(name)!r} there and {wanted.get(name)!r} now"
        for name in {**wanted, **held}
        if name not in but and held.get(name) != wanted.get(name)
    ]
    if changed:
        raise FastgenError(
            f"{path} belongs to a run with other settings ({'; '.join(changed)}); choose another folder"
        )


def file_version(path: Path) -> tuple[int, int, int] | None:
    """Identifies a version of a file; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def trim_log(path: Path, step: int) -> None:
    """Drop log lines after a step: those steps are trained and logged again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if parse_json(line, path)["step"] > step:
                break
        except (FastgenError, KeyError, TypeError):
            break  # cut off by a kill
        kept.append(line + b"\n")
    atomic_write_bytes(path, b"".join(kept))
