"""Cases of the benchmark of kernels: packing and de-chunking, which dynamic chunking does with its tokens.

Sizes: DC-DiT-XL (width 1152) at 256² and 512² pixels and at a grid of 64 x 64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.evaluation.benchmarks.kernel_case import Case, Check, Inputs, close, equal, noise, size_of
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
    return [*_packing(), *_dechunking()]


# --- packing -----------------------------------------------------------------------------------------------------


def _scores(device: torch.device, samples: int, side: int) -> Tensor:
    return noise(device, samples, side * side, dtype=torch.float32).sigmoid()


def _kept(device: torch.device, samples: int, side: int) -> Packing:
    """A quarter of the positions of every sample."""
    with use_kernels("reference"):
        return pack_top(_scores(device, samples, side), side * side // 4)


def _fields(packing: Packing) -> list[Tensor]:
    return [packing.mask, packing.positions, packing.cu_seqlens, packing.sequence_ids, packing.rows]


def _packing() -> list[Case]:
    def top(samples: int, side: int) -> Callable[[torch.device], Inputs]:
        def build(device: torch.device) -> Inputs:
            count = side * side // 4
            keep = torch.full((samples,), count, device=device)
            return {"scores": _scores(device, samples, side), "keep": keep, "capacity": samples * count, "full": True}

        return build

    def mask(samples: int, side: int) -> Callable[[torch.device], Inputs]:
        def build(device: torch.device) -> Inputs:
            return {"mask": _scores(device, samples, side) > 0.5, "capacity": samples * side * side}

        return build

    def rows(samples: int, side: int) -> Callable[[torch.device], Inputs]:
        def build(device: torch.device) -> Inputs:
            packing = _kept(device, samples, side)
            return {"packed": noise(device, packing.capacity, _WIDTH), "packing": packing}

        return build

    def index_bytes(inputs: Inputs) -> int:
        grid = inputs["scores"] if "scores" in inputs else inputs["mask"]
        return size_of(grid) + 9 * grid.numel() + 16 * int(inputs["capacity"])

    def grid_bytes(inputs: Inputs) -> int:
        return size_of(inputs["packed"]) + inputs["packing"].mask.numel() * (2 * _WIDTH + 9)

    def same(result: Any, expected: Any) -> str | None:
        return equal(_fields(result), _fields(expected))

    sizes = [("32² x 2", 2, 32, False, True), ("64² x 64", 64, 64, True, False)]
    found = []
    for name, samples, side, large, on_cpu in sizes:
        indexed = [
            Case("pack_top", name, top(samples, side), pack_top, pack_top_reference, index_bytes, same, on_cpu=on_cpu),
            Case(
                "pack_mask",
                name,
                mask(samples, side),
                pack_mask,
                pack_mask_reference,
                index_bytes,
                same,
                on_cpu=on_cpu,
            ),
        ]
        back = rows(samples, side)
        found += [
            *indexed,
            Case("scatter", name, back, scatter, scatter_reference, grid_bytes, equal, large=large, on_cpu=on_cpu),
        ]
    return found


# --- de-chunking -------------------------------------------------------------------------------------------------


def _whole_reference(**inputs: Any) -> Tensor:
    with use_kernels("reference"):
        return dechunk(**inputs)


def _dechunking() -> list[Case]:
    def whole(samples: int, side: int) -> Callable[[torch.device], Inputs]:
        def build(device: torch.device) -> Inputs:
            packing = _kept(device, samples, side)
            return {
                "tokens": noise(device, packing.capacity, _WIDTH, seed=1),
                "positions": packing.positions,
                "probabilities": _scores(device, samples, side),
                "mask": packing.mask,
                "grid": (side, side),
                "rows": packing.rows,
            }

        return build

    def smoothing(samples: int, side: int) -> Callable[[torch.device], Inputs]:
        def build(device: torch.device) -> Inputs:
            inputs = dict(whole(samples, side)(device))
            del inputs["mask"], inputs["rows"]
            p = inputs["probabilities"].flatten()[inputs["positions"]]
            return inputs | {"probabilities": p, "samples": samples, "sigma": 1.0}

        return build

    def nearest(samples: int, side: int) -> Callable[[torch.device], Inputs]:
        return lambda device: {"mask": _kept(device, samples, side).mask.view(samples, side, side)}

    def whole_bytes(inputs: Inputs) -> int:
        # Tokens in, smoothed, read again, and the grid out.
        return 3 * size_of(inputs["tokens"]) + 2 * _WIDTH * inputs["mask"].numel()

    def smooth_bytes(inputs: Inputs) -> int:
        return 2 * size_of(inputs["tokens"])

    def smooth_flops(inputs: Inputs) -> int:
        # What the least of algorithms needs: 9 x 9 cells around a token, a quarter of them kept.
        return 2 * int(inputs["tokens"].numel()) * 20

    def nearest_bytes(inputs: Inputs) -> int:
        return 9 * int(inputs["mask"].numel())

    found = []
    sizes = [("32² x 2", 2, 32, True), ("64² x 16", 16, 64, False)]
    for name, samples, side, on_cpu in sizes:
        parts: list[tuple[str, Any, Any, Any, Any, Check]] = [
            ("dechunk", whole, dechunk, _whole_reference, whole_bytes, close()),
            ("smooth_kept", smoothing, smooth_kept, smooth_kept_reference, smooth_bytes, close()),
            ("nearest_kept", nearest, nearest_kept, nearest_kept_reference, nearest_bytes, equal),
        ]
        for op, build, run, reference, moved, check in parts:
            options: dict[str, Any] = {"on_cpu": on_cpu}
            options["flops"] = smooth_flops if op == "smooth_kept" else None
            options["compiled"] = op != "dechunk"  # its parts are
            found.append(Case(op, name, build(samples, side), run, reference, moved, check, **options))
    return found
