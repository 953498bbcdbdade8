"""Weight files: do they exist, and are they complete? By their headers and lengths, without torch."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

from fastgen.errors import FastgenError
from fastgen.io import parse_json, read_object

__all__ = ["check_safetensors", "check_weight_folder", "read_files", "variant_of", "weight_map"]


# model.fp16.safetensors, diffusion_pytorch_model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json
_VARIANT = re.compile(r"\.([A-Za-z]\w*)(-\d+-of-\d+)?\.(safetensors|bin)$|\.index\.([A-Za-z]\w*)\.json$")

_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")

_BITS = re.compile(r"\d+")  # of one element: F32, BF16, F8_E4M3, U8 …


def variant_of(file: Path) -> str | None:
    """The variant that a weight file or an index belongs to, as its name says."""
    found = _VARIANT.search(file.name)
    return found and (found[1] or found[4])


def check_weight_folder(folder: Path, stem: str | None = None, variant: str | None = None) -> None:
    """Check the weight files of a folder that are read; those of other variants are left alone.

    Args:
        folder: of a network.
        stem: name of the file that is expected, for the message.
        variant: read these where there are any, as diffusers does.

    Raises:
        FastgenError: one is missing or broken.
    """
    chosen, variants = _of_variant(folder, variant)
    files = sorted(file for file in chosen if file.suffix == ".safetensors")
    for index in sorted(file for file in chosen if file.suffix == ".json"):
        for shard in sorted(set(weight_map(index).values())):
            if not (folder / shard).is_file():
                raise FastgenError(f"weight file {folder / shard} is missing ({index.name} lists it)")
    if not chosen and variants:
        raise FastgenError(
            f"{folder} holds only weights of the variant {' and '.join(sorted(variants))}: choose one with variant= "
            "or --variant"
        )
    if not files and not any(file.suffix == ".bin" for file in chosen):
        expected = f"{stem}.safetensors" if stem else "*.safetensors"
        raise FastgenError(f"weight file {folder / expected} is missing")
    for file in files:
        check_safetensors(file)


def weight_map(index: Path) -> dict[str, str]:
    """Which file of its folder each weight is in, from an index.

    Raises:
        FastgenError: the index is broken, or names something else than files of its folder.
    """
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict):
        raise FastgenError(f"{index} has no weight_map")
    for name, file in places.items():
        if not isinstance(file, str) or not file or Path(file).name != file or "\0" in file:
            raise FastgenError(f"{index}: {name} is in {str(file)[:60]!r}, needs the name of a file in its folder")
    return places


def read_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The weight files of a folder that the libraries read: the whole one, else the parts that the index lists."""
    chosen, _ = _of_variant(folder, variant)
    for suffix in (".safetensors", ".bin"):
        files = sorted(file for file in chosen if file.suffix == suffix)
        whole = [file for file in files if file.name.split(".")[0] in _STEMS]
        if files:
            return whole or files
    return []


def _of_variant(folder: Path, variant: str | None) -> tuple[list[Path], set[str]]:
    """The weight files and indices of a variant, or those of none where it has none; and which variants there are."""
    every = [
        file for pattern in ("*.safetensors", "*.bin", "*.safetensors.index*.json") for file in folder.glob(pattern)
    ]
    variants = {each for file in every if (each := variant_of(file)) is not None}
    return [file for file in every if variant_of(file) == (variant if variant in variants else None)], variants


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
        header = parse_json(header_bytes, f"the header of weight file {path}")
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        needed = 8 + len(header_bytes) + max(map(_end, tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise FastgenError(f"weight file {path} is corrupt: its header cannot be read") from error
    if size < needed:
        raise FastgenError(f"weight file {path} is truncated: it has {size} of {needed} bytes")
    if size > needed:
        raise FastgenError(f"weight file {path} is corrupt: it has {size} bytes, its header accounts for {needed}")
    return tensors


def _end(entry: dict[str, Any]) -> int:
    """Where a tensor ends in the file.

    Raises:
        ValueError, TypeError, KeyError: the entry contradicts itself, or is something else.
    """
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, start, end)):
        raise ValueError("a shape or an offset is no integer >= 0")
    bits = int(_BITS.search(entry["dtype"])[0]) if entry["dtype"] != "BOOL" else 8  # type: ignore[index]
    if math.prod(shape) * bits != 8 * (end - start):
        raise ValueError("a shape does not fit its data")
    return int(end)
