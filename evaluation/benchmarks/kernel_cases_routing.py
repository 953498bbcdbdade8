"""Cases of the benchmark of kernels: packing and de-chunking, which dynamic chunking does with its tokens.

Sizes: DC-DiT-XL (width 1152) at 256² and 512² pixels and at a grid of 64 x 64.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgen.evaluation.benchmarks.kernel_case import Case, Inputs, close, equal, noise, size_of
from fastgen.kernels.dechunk import (
    dechunk,
    nearest_kept,
    nearest_kept_reference,
    smooth_kept,
    smooth_kept_reference,
)
from fastgen.kernels.dispatch import use_kernels
from fastgen.kernels.pack import (
    Packing,
    pack_mask,
    pack_mask_reference,
    pack_top,
    pack_top_reference,
    scatter,
    scatter_reference,
)

__all__ = ["cases"]

_WIDTH = 1152


def cases() -> list[Case]:
    """All cases of these operations."""
    packing = [("32² x 2", 2, 32, False), ("64² x 64", 64, 64, True)]
    dechunking = [("32² x 2", 2, 32, False), ("64² x 16", 16, 64, True)]
    found = []
    for table, sizes in ((_PACKING, packing), (_DECHUNKING, dechunking)):
        for name, samples, side, large in sizes:
            for op, build, run, reference, moved, check, more in table:
                inputs = partial(build, samples=samples, side=side)
                # The share of the roofline counts where only memory is moved.
                limits: dict[str, Any] = {"large": large and op == "scatter", "on_cpu": not large}
                found.append(Case(op, name, inputs, run, reference, moved, check, **limits, **more))
    return found


# --- packing -----------------------------------------------------------------------------------------------------


def _scores(device: torch.device, samples: int, side: int) -> Tensor:
    return noise(device, samples, side * side, dtype=torch.float32).sigmoid()


def _kept(device: torch.device, samples: int, side: int) -> Packing:
    """A quarter of the positions of every sample."""
    with use_kernels("reference"):
        return pack_top(_scores(device, samples, side), side * side // 4)


def _top(device: torch.device, samples: int, side: int) -> Inputs:
    count = side * side // 4
    keep = torch.full((samples,), count, device=device)
    return {"scores": _scores(device, samples, side), "keep": keep, "capacity": samples * count, "full": True}


def _mask(device: torch.device, samples: int, side: int) -> Inputs:
    return {"mask": _scores(device, samples, side) > 0.5, "capacity": samples * side * side}


def _rows(device: torch.device, samples: int, side: int) -> Inputs:
    packing = _kept(device, samples, side)
    return {"packed": noise(device, packing.capacity, _WIDTH), "packing": packing}


def _index_bytes(inputs: Inputs) -> int:
    grid = inputs["scores"] if "scores" in inputs else inputs["mask"]
    return size_of(grid) + 9 * grid.numel() + 16 * int(inputs["capacity"])


def _grid_bytes(inputs: Inputs) -> int:
    return size_of(inputs["packed"]) + inputs["packing"].mask.numel() * (2 * _WIDTH + 9)


def _fields(packing: Packing) -> list[Tensor]:
    return [packing.mask, packing.positions, packing.cu_seqlens, packing.sequence_ids, packing.rows]


def _same(result: Any, expected: Any) -> str | None:
    return equal(_fields(result), _fields(expected))


# --- de-chunking -------------------------------------------------------------------------------------------------


def _whole(device: torch.device, samples: int, side: int) -> Inputs:
    packing = _kept(device, samples, side)
    return {
        "tokens": noise(device, packing.capacity, _WIDTH, seed=1),
        "positions": packing.positions,
        "probabilities": _scores(device, samples, side),
        "mask": packing.mask,
        "grid": (side, side),
        "rows": packing.rows,
    }


def _smoothing(device: torch.device, samples: int, side: int) -> Inputs:
    inputs = dict(_whole(device, samples, side))
    del inputs["mask"], inputs["rows"]
    p = inputs["probabilities"].flatten()[inputs["positions"]]
    return inputs | {"probabilities": p, "samples": samples, "sigma": 1.0}


def _nearest(device: torch.device, samples: int, side: int) -> Inputs:
    return {"mask": _kept(device, samples, side).mask.view(samples, side, side)}


def _whole_reference(**inputs: Any) -> Tensor:
    with use_kernels("reference"):
        return dechunk(**inputs)


def _whole_bytes(inputs: Inputs) -> int:
    # Tokens in, smoothed, read again, and the grid out.
    return 3 * size_of(inputs["tokens"]) + 2 * _WIDTH * inputs["mask"].numel()


def _smooth_bytes(inputs: Inputs) -> int:
    return 2 * size_of(inputs["tokens"])


def _smooth_flops(inputs: Inputs) -> int:
    # What the least of algorithms needs: 9 x 9 cells around a token, a quarter of them kept.
    return 2 * int(inputs["tokens"].numel()) * 20


def _nearest_bytes(inputs: Inputs) -> int:
    return 9 * int(inputs["mask"].numel())


# Operation, its inputs for a number of samples and a side of the grid, and further fields of its cases.
_PACKING: list[tuple[Any, ...]] = [
    ("pack_top", _top, pack_top, pack_top_reference, _index_bytes, _same, {}),
    ("pack_mask", _mask, pack_mask, pack_mask_reference, _index_bytes, _same, {}),
    ("scatter", _rows, scatter, scatter_reference, _grid_bytes, equal, {}),
]
_DECHUNKING: list[tuple[Any, ...]] = [
    ("dechunk", _whole, dechunk, _whole_reference, _whole_bytes, close(), {"compiled": False}),  # its parts are
    ("smooth_kept", _smoothing, smooth_kept, smooth_kept_reference, _smooth_bytes, close(), {"flops": _smooth_flops}),
    ("nearest_kept", _nearest, nearest_kept, nearest_kept_reference, _nearest_bytes, equal, {}),
]
