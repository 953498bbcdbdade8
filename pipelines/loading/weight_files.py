"""Weight files: do they exist, and are they complete? By their headers and lengths, without torch."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fastgen.errors import FastgenError, one_line
from fastgen.io import read_object

__all__ = ["check_safetensors", "read_files", "variant_of", "weight_map"]

# model.fp16.safetensors, diffusion_pytorch_model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json
_VARIANT = re.compile(r"\.([A-Za-z]\w*)(-\d+-of-\d+)?\.(safetensors|bin)$|\.index\.([A-Za-z]\w*)\.json$")
_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")


def variant_of(file: Path) -> str | None:
    """The variant that a weight file or an index belongs to, as its name says."""
    found = _VARIANT.search(file.name)
    return found and (found[1] or found[4])


def weight_map(index: Path) -> dict[str, str]:
    """The file that each weight is in, from an index; refuses anything else than names of files in its folder."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict):
        raise FastgenError(f"{index} has no weight_map")
    for name, file in places.items():
        if not isinstance(file, str) or not file or Path(file).name != file or "\0" in file:
            raise FastgenError(f"{index}: {name} is in {str(file)[:60]!r}, needs the name of a file in its folder")
    return places


def read_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The weight files of a folder that the libraries read: the whole one, else the parts that the index lists; those
    of a variant where there are any, as in diffusers. Refuses missing and truncated ones."""
    patterns = ("*.safetensors", "*.bin", "*.safetensors.index*.json")
    every = sorted(file for pattern in patterns for file in folder.glob(pattern))
    variants = {each for file in every if (each := variant_of(file)) is not None}
    chosen = [file for file in every if variant_of(file) == (variant if variant in variants else None)]
    if variants and not chosen:
        raise FastgenError(
            f"{folder} has only weights of the variant {' and '.join(sorted(variants))}: choose one with variant= "
            "or --variant"
        )
    for index in chosen:
        for shard in sorted(set(weight_map(index).values())) if index.suffix == ".json" else ():
            if not (folder / shard).is_file():
                raise FastgenError(f"weight file {folder / shard} is missing ({index.name} lists it)")
    for suffix in (".safetensors", ".bin"):
        if files := [file for file in chosen if file.suffix == suffix]:
            files = [file for file in files if file.name.split(".")[0] in _STEMS] or files
            for file in files if suffix == ".safetensors" else ():
                check_safetensors(file)
            return files
    raise FastgenError(f"weight file {folder / '*.safetensors'} is missing")


def check_safetensors(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Type as in the header ("F32", "BF16" …) and shape of each tensor of a safetensors file, which is read once;
    refuses truncated files and other ones."""
    try:
        found = path.stat()
        return _header(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    except OSError as error:
        raise FastgenError(f"cannot read weight file {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise FastgenError(f"weight file {path} is truncated or corrupt: {one_line(error)}") from error


@lru_cache
def _header(path: Path, *changes: int) -> dict[str, tuple[str, list[int]]]:
    """By path, and what changes with the file."""
    with path.open("rb") as start:
        if start.read(8) == b"version ":
            raise FastgenError(f"weight file {path} is a Git LFS pointer, not the weights; run `git lfs pull`")
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in tensors.items()}
