"""Weights by folder, file or Hub id, with one line for the user when they cannot be loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import FastgenError
from fastgen.pipelines.loading.faults import explained as translated

__all__ = ["check_loaded", "explained", "find_file", "part", "place", "read_tensors", "snapshot"]


@contextmanager
def explained(verifier: str, weights: str | Path, use: str = "") -> Iterator[None]:
    """Turn an error of a stock loader into one line that names the verifier, the weights and how to get them.

    Args:
        verifier: its name; another kind of model comes with its kind, as in "detector mask2former".
        weights: a file, a folder or a Hub id.
        use: what to do with the downloaded folder; "": load the verifier with it.

    Raises:
        FastgenError: instead of any other error.
    """
    hub_id = None if Path(weights).exists() else str(weights)
    what = str(weights) if hub_id is None else f"model {hub_id!r}"
    with translated(f"{_named(verifier)}: {what}", hub_id=hub_id, use=use or f"load {verifier}:FOLDER"):
        yield


def _named(name: str) -> str:
    """How a message begins: names of verifiers are one word, others say what they are."""
    return name if " " in name else f"verifier {name}"


def snapshot(verifier: str, weights: str, patterns: Sequence[str]) -> Path:
    """The folder `weights`, or the files of that Hub repository that match."""
    if Path(weights).is_dir():
        return Path(weights)
    from huggingface_hub import snapshot_download

    with explained(verifier, weights):
        return Path(snapshot_download(weights, allow_patterns=list(patterns)))


def find_file(verifier: str, weights: str, names: Sequence[str], use: str = "") -> Path:
    """The file `weights`, or the first of `names` that the folder or Hub repository `weights` contains.

    It asks for one small file before a stock loader runs; its error about a missing repository is clearer than theirs.

    Raises:
        FastgenError: there is no such file; `use` as in `explained`.
    """
    path = Path(weights)
    if path.is_file():
        return path
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FastgenError(f"{_named(verifier)}: {path} has no {' or '.join(names)}")
        return found[0]
    from huggingface_hub import errors, hf_hub_download

    with explained(verifier, weights, use):
        for name in names[:-1]:
            try:
                return Path(hf_hub_download(weights, name))
            except errors.EntryNotFoundError:
                continue  # under another name, or not there: the last one says
        return Path(hf_hub_download(weights, names[-1]))


def part(weights: str, folder: str, fallback: str) -> str:
    """The place of a component that another repository publishes: in `weights`/`folder` if there is one."""
    inside = Path(weights) / folder
    return str(inside) if inside.is_dir() else fallback


def check_loaded(verifier: str, weights: str | Path, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that leaves a weight unset, which transformers only logs.

    Raises:
        FastgenError: names the first such weight.
    """
    if missing := sorted(info.get("missing_keys") or ()):
        raise FastgenError(f"{_named(verifier)}: {weights} lacks {len(missing)} weights, the first is {missing[0]!r}")
    if mismatched := sorted(map(str, info.get("mismatched_keys") or ())):
        raise FastgenError(
            f"{_named(verifier)}: {weights} has {len(mismatched)} weights of a wrong shape: {mismatched[0]}"
        )


def read_tensors(file: Path, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file on the CPU; `wanted` chooses some by name."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys() if not wanted or wanted(name)}  # noqa: SIM118
    held: Mapping[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=wanted is not None)
    return {name: tensor for name, tensor in held.items() if not wanted or wanted(name)}


def place(device: str, dtype: str, auto: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Device and weight type; `auto` is the type used for "auto".

    Raises:
        FastgenError: this machine has no such device, or it cannot compute in this type.
    """
    from fastgen.pipelines.loading import resolve_device

    return resolve_device(device, auto if dtype == "auto" else dtype)
