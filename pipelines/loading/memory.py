"""Whether a model fits into memory, before its weights are read: sizes by the headers of their files."""

from __future__ import annotations

import contextlib
import importlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgen.errors import FastgenError
from fastgen.pipelines.loading.checkpoint import Checkpoint, denoiser_name
from fastgen.pipelines.loading.networks import component_class
from fastgen.pipelines.loading.weight_files import check_safetensors, read_files
from fastgen.pipelines.quantization import BITS, layer_pattern

__all__ = ["check_memory", "free_memory", "weight_sizes"]

_FLOATS = ("F64", "F32", "F16", "BF16")
_CGROUP = Path("/sys/fs/cgroup")


def weight_sizes(checkpoint: Checkpoint, dtype: torch.dtype, quantize: str | None = None) -> dict[str, int]:
    """Bytes of each network's weights, which are on this machine, once they are loaded in a type of floating-point
    numbers, those of the denoiser in fewer bits where `quantize` is one of `BITS`."""
    fewer = {}
    if quantize is not None:
        name = denoiser_name(checkpoint.index)
        fewer = {name: (layer_pattern(component_class(*checkpoint.index[name])), BITS[quantize])}
    return {
        name: sum(_file_size(file, dtype, fewer.get(name)) for file in read_files(folder, checkpoint.variant))
        for name, folder in checkpoint.networks.items()
    }


def _file_size(file: Path, dtype: torch.dtype, fewer: tuple[re.Pattern[str], int] | None = None) -> int:
    """Bytes of a file's weights; `fewer`: bits of the matrices of layers with such names, and a scale per row."""
    if file.suffix != ".safetensors":
        return file.stat().st_size
    size = 0
    for name, (stored, shape) in check_safetensors(file).items():
        bits = 8 * dtype.itemsize
        if stored not in _FLOATS:
            bits = int((re.findall(r"\d+", stored) or ["8"])[0])
        elif fewer and len(shape) == 2 and fewer[0].fullmatch(name.removesuffix(".weight")):
            bits, size = fewer[1], size + shape[0] * dtype.itemsize
        size += math.prod(shape) * bits // 8
    return size


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a device's memory; of main memory no more than a container's limit leaves. None: not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    psutil: Any = importlib.import_module("psutil")
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, max(limit - used, 0))
    return free


def check_memory(model: str, sizes: Mapping[str, int], device: torch.device, offload: str, dtype: torch.dtype) -> None:
    """Refuse a model whose weights, of these `sizes` in bytes, are larger than the memory they have to be in when it
    computes on `device` by this way of offloading, which is not "auto"."""
    total, largest = sum(sizes.values()), max(sizes.values(), default=0)
    on_device = {"none": total, "model": largest}.get(offload, 0)
    in_main = 0 if device.type == "cpu" else largest if offload == "none" else total
    kind = str(dtype).removeprefix("torch.")
    for needed, where in ((on_device, device), (in_main, torch.device("cpu"))):
        free = free_memory(where)
        if free is not None and needed > free:
            name = "main memory" if where.type == "cpu" else str(where)
            raise FastgenError(
                f"model {model!r} does not fit: {_gigabytes(needed)} of weights in {kind}, and {_gigabytes(free)} of "
                f"{name} are free; --dtype bfloat16, --quantize or --offload need less"
            )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
