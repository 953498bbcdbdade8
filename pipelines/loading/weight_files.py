"""Weight files: do they exist, and are they complete? By their headers and lengths, without torch."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fastgen.errors import FastgenError, one_line
from fastgen.io import read_object

__all__ = ["check_safetensors", "check_weight_folder", "read_files", "variant_of", "weight_map"]


# model.fp16.safetensors, diffusion_pytorch_model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json
_VARIANT = re.compile(r"\.([A-Za-z]\w*)(-\d+-of-\d+)?\.(safetensors|bin)$|\.index\.([A-Za-z]\w*)\.json$")

_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")


def variant_of(file: Path) -> str | None:
    """The variant that a weight file or an index belongs to, as its name says."""
    found = _VARIANT.search(file.name)
    return found and (found[1] or found[4])


def check_weight_folder(folder: Path, stem: str | None = None, variant: str | None = None) -> None:
    """Refuse missing and broken ones among the weight files of a folder that are read, those of a variant where there
    are any, as in diffusers. `stem` is the name of the file that is expected, for the message."""
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
    """Which file of its folder each weight is in, from an index; refuses anything else than files of its folder."""
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
    patterns = ("*.safetensors", "*.bin", "*.safetensors.index*.json")
    every = [file for pattern in patterns for file in folder.glob(pattern)]
    variants = {each for file in every if (each := variant_of(file)) is not None}
    return [file for file in every if variant_of(file) == (variant if variant in variants else None)], variants


def check_safetensors(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Type as in the header ("F32", "BF16" …) and shape of each tensor of a safetensors file; refuses truncated files
    and other ones."""
    try:
        with path.open("rb") as start:
            if start.read(8) == b"version ":
                raise FastgenError(f"weight file {path} is a Git LFS pointer, not the weights; run `git lfs pull`")
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in tensors.items()}
    except OSError as error:
        raise FastgenError(f"cannot read weight file {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise FastgenError(f"weight file {path} is truncated or corrupt: {one_line(error)}") from error
