"""Whether a model fits into memory, before its weights are read: sizes by the headers of their files."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgen.errors import FastgenError
from fastgen.pipelines.loading.checkpoint import Checkpoint
from fastgen.pipelines.loading.weight_files import check_safetensors, read_files

__all__ = ["check_memory", "free_memory", "weight_sizes"]

_FLOATS = ("F64", "F32", "F16", "BF16")
_CGROUP = Path("/sys/fs/cgroup")


def weight_sizes(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each network's weights once they are loaded in a type.

    Args:
        checkpoint: with its weights on this machine.
        dtype: of weights that are floating-point numbers; others keep theirs.
    """
    if checkpoint.kind == "janus":
        folders = {"model": checkpoint.folder}
    else:
        names = (name for name, entry in checkpoint.index.items() if isinstance(entry, list) and name[:1] != "_")
        folders = {name: at for name in names if ((at := checkpoint.component(name)) / "config.json").is_file()}
    sizes = {
        name: sum(_file_size(file, dtype) for file in read_files(folder, checkpoint.variant))
        for name, folder in folders.items()
    }
    return {name: size for name, size in sizes.items() if size}


def _file_size(file: Path, dtype: torch.dtype) -> int:
    if file.suffix != ".safetensors":
        return file.stat().st_size
    tensors = check_safetensors(file).values()
    return sum(
        math.prod(entry["shape"]) * dtype.itemsize
        if entry["dtype"] in _FLOATS
        else entry["data_offsets"][1] - entry["data_offsets"][0]
        for entry in tensors
    )


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a device's memory; of main memory no more than a container's limit leaves. None: not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    psutil: Any = importlib.import_module("psutil")
    free = int(psutil.virtual_memory().available)
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, max(limit - used, 0))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no container, or "max"
        return None


def check_memory(model: str, sizes: Mapping[str, int], device: torch.device, offload: str, dtype: torch.dtype) -> None:
    """Refuse a model whose weights alone are larger than the memory they have to be in.

    Args:
        model: its name, for the message.
        sizes: bytes of each network's weights.
        device: where it computes.
        offload: the way that was chosen, not "auto".
        dtype: of the weights, for the message.

    Raises:
        FastgenError: with the sizes, and what would help.
    """
    total, largest = sum(sizes.values()), max(sizes.values(), default=0)
    on_device = {"none": total, "model": largest}.get(offload, 0)
    in_main = 0 if device.type == "cpu" else largest if offload == "none" else total
    kind = str(dtype).removeprefix("torch.")
    if device.type == "cpu":
        advice = "--dtype bfloat16 takes half of it" if dtype == torch.float32 else "it needs a larger machine"
    else:
        advice = f"--offload {'auto' if offload == 'none' else 'group'} takes less of it"
    for needed, where, help_text in (
        (on_device, device, advice),
        (in_main, torch.device("cpu"), "weights pass through it"),
    ):
        free = free_memory(where)
        if free is not None and needed > free:
            name = "main memory" if where.type == "cpu" else str(where)
            raise FastgenError(
                f"model {model!r} does not fit: {_gigabytes(needed)} of weights in {kind}, and {_gigabytes(free)} of "
                f"{name} are free; {help_text}"
            )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
