"""De-chunking of DC-DiT (specification of arXiv 2603.06351, section "de-chunking"): kept tokens back to the grid.

Two steps: smoothing mixes each kept token with its kept neighbours where the router was unsure, and plug-back gives
every grid position the value of its nearest kept token. Neither builds an L x L or M x M array. In the reference the
Gaussian is separable, so smoothing is one matrix product per axis, and the nearest kept token is found column by
column first; the kernel reads only kept tokens in nearby rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.checks import check_bool
from fastgen.kernels.arguments import check_int, check_number, check_tensors, shown
from fastgen.kernels.dechunk.operator import launch_nearest, launch_smooth
from fastgen.kernels.dechunk.reference import nearest_kept_reference, smooth_kept_reference
from fastgen.kernels.dispatch import check_ascending, checks_values, choose

__all__ = ["dechunk", "nearest_kept", "nearest_kept_reference", "smooth_kept", "smooth_kept_reference"]

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST = 256
"""Most columns of a grid that the kernel supports."""


def nearest_kept(mask: Tensor, rows: Tensor | None = None) -> Tensor:
    """Nearest kept position of every grid position, in Euclidean distance; ties go to the lowest index.

    Args:
        mask: bool [n, H, W], at least one kept position in each grid.
        rows: int64 [n * H * W], values to return instead of a position's index; None returns the index.

    Returns:
        int64 [n, H, W], row * W + column of the nearest kept position (0 in a grid without any), or the value of
        `rows` there.

    Raises:
        TypeError: an argument that must be a tensor is not one.
        ValueError: another dtype, shape or device.
    """
    check_tensors({"mask": mask}, {"rows": rows})
    if mask.ndim != 3 or mask.dtype != torch.bool:
        raise ValueError(f"mask: needs bool [n, H, W], got {shown(mask)}")
    reason = None if mask.shape[2] <= _WIDEST else f"a grid of {mask.shape[2]} columns"
    if rows is not None and (rows.shape != (mask.numel(),) or rows.dtype != torch.int64):
        raise ValueError(f"rows: needs int64 [{mask.numel()}], got {shown(rows)}")
    # Not timed on a GPU; chosen because it avoids the reference's H * W * W integers.
    if not choose("nearest_kept", reason, True, mask):
        return nearest_kept_reference(mask, rows)
    return launch_nearest(mask, rows)


def smooth_kept(
    tokens: Tensor,
    positions: Tensor,
    probabilities: Tensor,
    grid: tuple[int, int],
    samples: int,
    sigma: float,
    rows: Tensor | None = None,
    full: bool = True,
) -> Tensor:
    """Confidence smoothing: out_i = p_i h_i + (1 - p_i) sum_j W_ij h_j / sum_k W_ik.

    W_ij = exp(-|u_i - u_j|^2 / (2 sigma^2)) p_j over the kept tokens j of the same sample, at grid coordinates u.

    Args:
        tokens: h, [T, D], kept tokens of all samples.
        positions: int64 [T], sample * H * W + row * W + column, ascending.
        probabilities: p of the kept tokens, [T], float32.
        grid: (H, W).
        samples: number of samples n.
        sigma: width of the Gaussian in grid units, > 0.
        rows: int64 [n * H * W], number of kept positions up to each one, minus one; None computes it if needed.
        full: False if some of the T are padding after the last token: their positions are -1, their values arbitrary.

    Returns:
        [T, D] in the dtype of `tokens`. Differentiable in tokens and probabilities.

    Raises:
        TypeError: an argument that must be a tensor is not one.
        ValueError: shapes, dtypes, devices or numbers that do not fit. `positions` are checked on a CPU, and with
            FASTGEN_KERNELS_DEBUG=1 on a GPU.
    """
    check_tensors({"tokens": tokens, "positions": positions, "probabilities": probabilities}, {"rows": rows})
    size = _check_grid(grid, samples, sigma, full)
    if tokens.ndim != 2 or positions.shape != tokens.shape[:1] or probabilities.shape != positions.shape:
        raise ValueError(
            f"smooth_kept: tokens {tuple(tokens.shape)}, positions {tuple(positions.shape)} and probabilities "
            f"{tuple(probabilities.shape)} do not fit"
        )
    _check_packed(tokens, positions, probabilities)
    if rows is not None and (rows.shape != (size,) or rows.dtype != torch.int64):
        raise ValueError(f"rows: needs int64 [{size}], got {shown(rows)}")
    check_ascending(positions, size, full)
    return _smoothed(tokens, positions, probabilities, grid, samples, sigma, rows, full)


def _smoothed(
    tokens: Tensor,
    positions: Tensor,
    probabilities: Tensor,
    grid: tuple[int, int],
    samples: int,
    sigma: float,
    rows: Tensor | None,
    full: bool,
) -> Tensor:
    """`smooth_kept` with checked arguments."""
    size = samples * grid[0] * grid[1]
    reason = None if tokens.dtype in _TYPES and probabilities.dtype == torch.float32 else f"{tokens.dtype}"
    # Not timed on a GPU; chosen because it avoids the reference's dense float32 fields [n, L, D].
    if not choose("smooth_kept", reason, True, tokens, positions, probabilities):
        return smooth_kept_reference(tokens, positions, probabilities, grid, samples, sigma, full)
    if rows is None:
        kept = torch.zeros(size + 1, dtype=torch.int64, device=positions.device)
        rows = kept.index_fill_(0, torch.where(positions >= 0, positions, size), 1)[:size].cumsum(0) - 1
    return launch_smooth(tokens, positions, probabilities, rows, *grid, sigma)


def dechunk(
    tokens: Tensor,
    positions: Tensor,
    probabilities: Tensor,
    mask: Tensor,
    grid: tuple[int, int],
    sigma: float | None = 1.0,
    rows: Tensor | None = None,
    full: bool = True,
) -> Tensor:
    """Expand kept tokens to every grid position: smoothing, then plug-back.

    Args:
        tokens: [T, D], kept tokens, sample by sample in raster order.
        positions: int64 [T], sample * L + index, ascending.
        probabilities: boundary probabilities of all positions, [n, L], float32.
        mask: bool [n, L], kept positions.
        grid: (H, W) with H * W = L.
        sigma: width of the smoothing Gaussian in grid units; None skips smoothing.
        rows: int64 [n, L], number of kept positions up to each one, minus one (`Packing.rows`); None computes it.
        full: False if some of the T are padding after the last token: their positions are -1, their values arbitrary.

    Returns:
        [n, L, D].

    Raises:
        TypeError: an argument that must be a tensor is not one.
        ValueError: shapes, dtypes, devices or numbers that do not fit; see `smooth_kept`.
    """
    needed = {"tokens": tokens, "positions": positions, "probabilities": probabilities, "mask": mask}
    check_tensors(needed, {"rows": rows})
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask: needs bool [n, L], got {shown(mask)}")
    samples, length = mask.shape
    _check_grid(grid, samples, 1.0 if sigma is None else sigma, full)
    _check_packed(tokens, positions, probabilities)
    height, width = grid
    fits = height * width == length and probabilities.shape == mask.shape
    if not fits or tokens.ndim != 2 or positions.shape != tokens.shape[:1]:
        raise ValueError(
            f"dechunk: grid {grid}, mask {tuple(mask.shape)}, probabilities {tuple(probabilities.shape)}, "
            f"tokens {tuple(tokens.shape)} and positions {tuple(positions.shape)} do not fit"
        )
    check_ascending(positions, samples * length, full)
    # Maps a flat grid position to the row of its token.
    rows = mask.flatten().cumsum(0) - 1 if rows is None else rows.flatten()
    index = nearest_kept(mask.view(samples, height, width), rows).flatten()  # this checks `rows`
    if checks_values(index) and checks_values(positions):
        samples_of = torch.arange(len(index), device=index.device) // length
        inside = bool(((index >= 0) & (index < len(tokens))).all())
        if not inside or not torch.equal(positions[index] // length, samples_of):
            raise ValueError("mask, rows: every position needs a token of its own sample, and one has none")
    if sigma is not None:
        kept = probabilities.flatten().index_select(0, positions if full else positions.clamp_min(0))
        tokens = _smoothed(tokens, positions, kept, grid, samples, sigma, rows, full)
    # Plug-back: PyTorch copies rows as fast as a Triton kernel does.
    return tokens.index_select(0, index).view(samples, length, tokens.shape[1])


def _check_grid(grid: tuple[int, int], samples: int, sigma: float, full: bool) -> int:
    """Check these arguments. Returns the number of positions of all samples."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"grid: needs (H, W), got {grid!r}")
    for side in grid:
        check_int("grid", side, 1)
    check_int("samples", samples, 0)
    check_number("sigma", sigma, above=0)
    check_bool("full", full)
    return samples * grid[0] * grid[1]


def _check_packed(tokens: Tensor, positions: Tensor, probabilities: Tensor | None = None) -> None:
    """Check the dtypes of packed tokens."""
    if not tokens.is_floating_point():
        raise ValueError(f"tokens: need floats [T, D], got {shown(tokens)}")
    if positions.dtype != torch.int64:
        raise ValueError(f"positions: need int64 [T], got {shown(positions)}")
    wanted = {torch.float32, torch.promote_types(tokens.dtype, torch.float32)}  # a router returns float32
    if probabilities is not None and probabilities.dtype not in wanted:
        raise ValueError(f"probabilities: need float32 (or float64 for such tokens), got {shown(probabilities)}")
