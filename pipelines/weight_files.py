"""Weight files: are they there, and whole? Told by their headers and lengths, without torch."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from fastgen.errors import FastgenError
from fastgen.io import read_object

__all__ = ["check_safetensors", "check_weight_folder"]


def check_weight_folder(folder: Path, stem: str | None = None) -> None:
    """Check the weight files of a folder.

    Args:
        folder: of a network.
        stem: name of the file that is expected, for the message.

    Raises:
        FastgenError: one is missing or broken.
    """
    files = sorted(folder.glob("*.safetensors"))
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict):
            raise FastgenError(f"{index} has no weight_map")
        for shard in sorted(set(map(str, shards.values()))):
            if not (folder / shard).is_file():
                raise FastgenError(f"weight file {folder / shard} is missing ({index.name} lists it)")
    if not files and not any(folder.glob("*.bin")):
        expected = f"{stem}.safetensors" if stem else "*.safetensors"
        raise FastgenError(f"weight file {folder / expected} is missing")
    for file in files:
        check_safetensors(file)


def check_safetensors(path: Path) -> dict[str, Any]:
    """Check a safetensors file by its header and its length.

    Returns:
        the header: tensor name -> {"dtype", "shape", "data_offsets"}.

    Raises:
        FastgenError: the file is truncated or is something else.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start.startswith(b"version "):
                raise FastgenError(f"weight file {path} is a Git LFS pointer, not the weights; run `git lfs pull`")
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else math.inf
            header_bytes = file.read(int(length)) if length <= min(size - 8, 100 * 2**20) else b""
    except OSError as error:
        raise FastgenError(f"cannot read weight file {path}: {error.strerror or error}") from error
    if not header_bytes:
        raise FastgenError(f"weight file {path} is truncated or not in safetensors format ({size} bytes)")
    try:
        header = json.loads(header_bytes)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        needed = 8 + len(header_bytes) + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise FastgenError(f"weight file {path} is corrupt: its header cannot be read") from error
    if size < needed:
        raise FastgenError(f"weight file {path} is truncated: it has {size} of {needed} bytes")
    if size > needed:
        raise FastgenError(f"weight file {path} is corrupt: it has {size} bytes, its header accounts for {needed}")
    return tensors
