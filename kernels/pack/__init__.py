"""Pack the kept tokens of a batch into one tensor, and unpack them, without host synchronisation.

A mask, or the largest scores of each sample, gives positions, `cu_seqlens` and rows. The host knows the capacity of
the packed tensor; the counts stay on the device. `pack` gathers the rows, `scatter` puts them back on the grid; each
is the other's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.checks import check_bool
from fastgen.kernels.arguments import check_int, check_tensors, shown
from fastgen.kernels.dispatch import checks_values, choose
from fastgen.kernels.pack.operator import launch_mask, launch_scatter, launch_top
from fastgen.kernels.pack.reference import Packing, pack_mask_reference, pack_top_reference, scatter_reference

__all__ = ["Packing", "pack", "pack_mask", "pack_mask_reference", "pack_top", "pack_top_reference"]
__all__ += ["scatter", "scatter_reference"]

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_COMPILED = 2**16
_LARGEST_SAMPLE = 2**15
"""Most positions of a sample that one program can rank."""


def pack_mask(mask: Tensor, capacity: int | None = None, full: bool = False) -> Packing:
    """Positions, `cu_seqlens` and rows of a mask, without host synchronisation.

    Args:
        mask: bool [n, L].
        capacity: rows of the packed tensor, at least the number of kept positions; None takes n * L.
        full: promises that exactly `capacity` positions are kept.

    Raises:
        TypeError: `mask` is not a tensor.
        ValueError: another dtype or shape; on the CPU also a capacity that does not fit the mask. (On a GPU, positions
            beyond the capacity are dropped, from the mask too; FASTGEN_KERNELS_DEBUG=1 checks there as well.)
    """
    check_tensors({"mask": mask})
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask: needs bool [n, L], got {shown(mask)}")
    check_bool("full", full)
    capacity = mask.numel() if capacity is None else capacity
    check_int("capacity", capacity, 0, mask.numel())
    if checks_values(mask):
        _check_kept(int(mask.sum()), capacity, full)
    reason = None if mask.shape[1] <= _LARGEST_SAMPLE else f"{mask.shape[1]} positions in a sample"
    # For large grids the compiled reference is faster (64 x 64², H100).
    default = not torch.compiler.is_compiling() or mask.numel() <= _COMPILED
    if not choose("pack_mask", reason, default, mask):
        return pack_mask_reference(mask, capacity, full)
    kept, positions, cu_seqlens, ids, rows = launch_mask(mask, capacity)
    return Packing(kept, positions, cu_seqlens, ids, rows, full)


def pack_top(scores: Tensor, keep: int | Tensor, capacity: int | None = None, full: bool = False) -> Packing:
    """Keep the largest scores of each sample; of equal ones those with the lowest index.

    Args:
        scores: [n, L] float32; NaN counts as the largest.
        keep: number of positions to keep per sample: one number from 1 to L, or int64 [n], clamped to 0 … L.
        capacity: as in `pack_mask`; None takes n * L, or n * keep if `keep` is one number.
        full: as in `pack_mask`; implied if `keep` is one number.

    Raises:
        TypeError: `scores` is not a tensor.
        ValueError: another dtype or shape, or numbers out of range.
    """
    check_tensors({"scores": scores})
    if scores.ndim != 2 or scores.dtype != torch.float32:
        raise ValueError(f"scores: need float32 [n, L], got {shown(scores)}")
    check_bool("full", full)
    samples, length = scores.shape
    if not isinstance(keep, Tensor):
        check_int("keep", keep, 1, length)
        if capacity is not None and capacity != samples * keep:
            raise ValueError(f"capacity: {capacity} is not allowed, {samples * keep} positions are kept")
        capacity, full = samples * keep, True
        counts = torch.full((samples,), keep, dtype=torch.int64, device=scores.device)
    elif keep.shape != (samples,) or keep.dtype != torch.int64:
        raise ValueError(f"keep: needs a number or int64 [{samples}], got {shown(keep)}")
    else:
        check_tensors({"scores": scores, "keep": keep})
        capacity, counts = samples * length if capacity is None else capacity, keep
        check_int("capacity", capacity, 0, scores.numel())
        if checks_values(keep):
            _check_kept(int(keep.clamp(0, length).sum()), capacity, full)
    reason = None if length <= _LARGEST_SAMPLE else f"{length} positions in a sample"
    if not choose("pack_top", reason, True, scores, counts):
        return pack_top_reference(scores.detach(), counts, capacity, full)
    mask, positions, cu_seqlens, ids, rows = launch_top(scores.detach(), counts, capacity)
    return Packing(mask, positions, cu_seqlens, ids, rows, full)


def pack(tokens: Tensor, packing: Packing) -> Tensor:
    """Kept tokens [capacity, D] of tokens [n, L, D]; zeros after the last. Differentiable.

    Raises:
        TypeError: not a tensor, or not a `Packing`.
        ValueError: a shape or device that does not fit, or an integer dtype.
    """
    _check_packing("tokens", tokens, packing)
    if tokens.ndim != 3 or tokens.shape[:2] != packing.mask.shape or not tokens.is_floating_point():
        raise ValueError(
            f"tokens: need floating point [{', '.join(map(str, packing.mask.shape))}, D], got {shown(tokens)}"
        )
    # PyTorch copies rows as fast as a Triton kernel does.
    rows = tokens.flatten(0, 1).index_select(0, packing.positions.clamp_min(0))
    return rows if packing.full else torch.where((packing.positions >= 0)[:, None], rows, 0.0)


def scatter(packed: Tensor, packing: Packing) -> Tensor:
    """Packed tokens [capacity, D] at their positions, zeros elsewhere: [n, L, D]. Differentiable.

    Raises:
        TypeError: not a tensor, or not a `Packing`.
        ValueError: a shape or device that does not fit, or an integer dtype.
    """
    _check_packing("packed", packed, packing)
    if packed.ndim != 2 or len(packed) != packing.capacity or not packed.is_floating_point():
        raise ValueError(f"packed: needs floating point [{packing.capacity}, D], got {shown(packed)}")
    reason = None if packed.dtype in _TYPES else f"{packed.dtype}"
    if not choose("scatter", reason, True, packed, packing.rows):
        return scatter_reference(packed, packing)
    return launch_scatter(packed, packing.mask, packing.positions, packing.rows)


def _check_kept(kept: int, capacity: int, full: bool) -> None:
    if kept > capacity or (full and kept < capacity):
        raise ValueError(f"capacity: {capacity} is not allowed, {kept} positions are kept")


def _check_packing(name: str, tensor: Tensor, packing: Packing) -> None:
    if not isinstance(packing, Packing):
        raise TypeError(f"packing: needs a Packing, got {type(packing).__name__}")
    check_tensors({"packing": packing.positions, name: tensor})
