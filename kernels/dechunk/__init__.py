"""De-chunking of DC-DiT (specification of arXiv 2603.06351, section "de-chunking"): kept tokens back to the grid.

Two steps: smoothing mixes each kept token with its kept neighbours where the router was unsure, and plug-back gives
every grid position the value of its nearest kept token. Neither ever builds an L x L or M x M array. In the reference
the Gaussian is separable, so smoothing is one matrix product per axis, and the nearest kept token is found column by
column first; the kernel weighs the kept tokens of the rows around and looks at no others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.arguments import check_flag, check_int, check_number, check_tensors, shown
from fastgen.kernels.dispatch import check_ascending, check_range, choose, direct, looks

__all__ = ["dechunk", "nearest_kept", "nearest_kept_reference", "plug_back", "plug_back_reference", "smooth_kept"]
__all__ += ["smooth_kept_reference"]

_TINY = 1e-12
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_TOGETHER = {"cpu": 2**21}
"""Numbers of one temporary of the references: 16 MiB at most on a CPU; on a GPU `_AT_ONCE`, for fewer launches."""
_AT_ONCE = 2**25
_WIDEST = 256
"""Columns of a grid that the kernel looks through for the nearest."""


def nearest_kept(mask: Tensor, rows: Tensor | None = None) -> Tensor:
    """Nearest kept position of every grid position, in Euclidean distance; ties go to the lowest index.

    Args:
        mask: bool [n, H, W], at least one kept position in each grid.
        rows: int64 [n * H * W], what to give for a position in place of its index; None gives the index.

    Returns:
        int64 [n, H, W], row * W + column of the nearest kept position (0 in a grid without any), or what `rows` of
        the same sample holds there.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: another dtype, shape or device.
    """
    check_tensors({"mask": mask}, {"rows": rows})
    if mask.ndim != 3 or mask.dtype != torch.bool:
        raise ValueError(f"mask: needs bool [n, H, W], got {shown(mask)}")
    reason = None if mask.shape[2] <= _WIDEST else f"a grid of {mask.shape[2]} columns"
    if rows is not None and (rows.shape != (mask.numel(),) or rows.dtype != torch.int64):
        raise ValueError(f"rows: needs int64 [{mask.numel()}], got {shown(rows)}")
    # Not timed on a GPU: taken for the reference's H * W * W integers that it does without.
    if not choose("nearest_kept", reason, True, mask):
        return nearest_kept_reference(mask, rows)
    if direct(mask):
        from fastgen.kernels.dechunk.triton import launch_nearest

        return launch_nearest(mask, rows)
    found: Tensor = torch.ops.fastgen.nearest_kept(mask, rows)
    return found


def nearest_kept_reference(mask: Tensor, rows: Tensor | None = None) -> Tensor:
    """The specification of `nearest_kept`. Memory: H * W * W integers a sample, for as many samples at once as stay
    below 2^21 of them."""
    n, height, width = mask.shape
    if rows is not None:
        starts = height * width * torch.arange(n, device=mask.device)[:, None, None]
        return rows[nearest_kept_reference(mask) + starts]
    together = max(1, _most(mask) // max(1, height * width * width))
    if n > together:
        return torch.cat([nearest_kept_reference(part) for part in mask.split(together)])
    rows = torch.arange(height, device=mask.device)[:, None].expand(height, width)
    far = 2 * (height + width)  # further than anything on the grid
    # Within each column: the last kept row at or above, and the first one at or below.
    above = torch.where(mask, rows, -far).cummax(dim=1).values
    below = torch.where(mask, rows, height + far).flip(1).cummin(dim=1).values.flip(1)
    up, down = rows - above, below - rows
    row = torch.where(up <= down, above, below)  # a tie goes to the lower index
    gap = torch.minimum(up, down).clamp(max=far)
    columns = torch.arange(width, device=mask.device)
    across = (columns[:, None] - columns[None, :]).square()  # [W, W']
    index = row * width + columns
    # Squared distance first, index second, in one integer; a column without a kept row is too far to win.
    size = height * width
    key = (across + gap.square()[:, :, None, :]) * size + index.clamp(0, size - 1)[:, :, None, :]
    winner: Tensor = key.amin(dim=-1) % size
    return winner


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
        rows: int64 [n * H * W], kept positions at or before each one, less one; None computes it where it is needed.
        full: False where some of the T are behind the last token: their positions are -1, their values anything.

    Returns:
        [T, D] in the dtype of `tokens`. Differentiable in tokens and probabilities.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes, dtypes, devices or numbers that do not fit. `positions` are looked at on a CPU, and with
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
    check_ascending("positions", positions, size, full)
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
    """`smooth_kept` of arguments that were checked."""
    size = samples * grid[0] * grid[1]
    reason = None if tokens.dtype in _TYPES and probabilities.dtype == torch.float32 else f"{tokens.dtype}"
    # Not timed on a GPU: taken for the reference's dense fields [n, L, D] in float32 that it does without.
    if not choose("smooth_kept", reason, True, tokens, positions, probabilities):
        return smooth_kept_reference(tokens, positions, probabilities, grid, samples, sigma, full)
    if rows is None:
        kept = torch.zeros(size + 1, dtype=torch.int64, device=positions.device)
        rows = kept.index_fill_(0, torch.where(positions >= 0, positions, size), 1)[:size].cumsum(0) - 1
    if direct(tokens, probabilities):
        from fastgen.kernels.dechunk.triton import launch_smooth

        return launch_smooth(tokens, positions, probabilities, rows, *grid, sigma)
    smoothed: Tensor = torch.ops.fastgen.smooth_kept(tokens, positions, probabilities, rows, *grid, sigma)
    return smoothed


def smooth_kept_reference(
    tokens: Tensor,
    positions: Tensor,
    probabilities: Tensor,
    grid: tuple[int, int],
    samples: int,
    sigma: float,
    full: bool = True,
) -> Tensor:
    """The specification of `smooth_kept`: temporaries of 2^21 numbers, as many channels at once as that allows."""
    probabilities = probabilities.to(torch.promote_types(probabilities.dtype, tokens.dtype))  # a model in float64
    weight = probabilities.clamp(min=_TINY)[:, None]
    height, width = grid
    size = samples * height * width
    vertical, horizontal = (_gaussian(side, sigma, weight) for side in grid)
    if not full:  # one row more takes what lies behind the last token
        positions = torch.where(positions >= 0, positions, size)

    def blurred(values: Tensor) -> Tensor:
        channels = values.shape[1]
        field = values.new_zeros(size if full else size + 1, channels).index_copy(0, positions, values)
        field = field if full else field[:size]
        field = vertical @ field.view(samples, height, width * channels)
        field = horizontal @ field.view(samples * height, width, channels)
        return field.view(-1, channels).index_select(0, positions if full else positions.clamp_max(size - 1))

    mass, confidence = blurred(weight), probabilities[:, None]

    def smoothed(part: Tensor) -> Tensor:
        hidden = part.to(weight.dtype)
        return (confidence * hidden + (1 - confidence) * (blurred(hidden * weight) / mass)).to(tokens.dtype)

    several = max(16, _most(tokens) // max(1, size))
    if tokens.shape[1] <= several:
        return smoothed(tokens)
    return torch.cat([smoothed(part) for part in tokens.split(several, dim=1)], dim=1)


def _most(tensor: Tensor) -> int:
    return _TOGETHER.get(tensor.device.type, _AT_ONCE)


def _gaussian(size: int, sigma: float, like: Tensor) -> Tensor:
    """[size, size] of exp(-(i - j)^2 / (2 sigma^2)), float32 (float64 for float64)."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    place = torch.arange(size, device=like.device, dtype=dtype)
    return torch.exp((place[:, None] - place[None, :]).square() / (-2 * sigma**2))


def plug_back(tokens: Tensor, index: Tensor, positions: Tensor, length: int) -> Tensor:
    """tokens[index], [n * L, D]: for every grid position the row of its token. The gradient is summed in fixed order.

    Args:
        tokens: [T, D].
        index: int64 [n * L], from 0 to T - 1; a token of the same sample.
        positions: int64 [T], sample * L + index, ascending; the gradient looks for a token's share in its own sample.
        length: L.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes, dtypes, devices or numbers that do not fit. `index` and `positions` are looked at on a CPU,
            and with FASTGEN_KERNELS_DEBUG=1 on a GPU.
    """
    check_tensors({"tokens": tokens, "index": index, "positions": positions})
    check_int("length", length, 1)
    if tokens.ndim != 2 or index.ndim != 1 or positions.shape != tokens.shape[:1]:
        raise ValueError(
            f"plug_back: tokens {tuple(tokens.shape)}, index {tuple(index.shape)} and positions "
            f"{tuple(positions.shape)} do not fit"
        )
    _check_packed(tokens, positions)
    if index.dtype != torch.int64:
        raise ValueError(f"index: needs int64 [n * L], got {shown(index)}")
    if index.shape[0] % length:
        raise ValueError(f"length: {length} is not allowed, needs a divisor of the {index.shape[0]} numbers of index")
    check_ascending("positions", positions, index.shape[0], False)
    return _spread(tokens, index, positions, length)


def _spread(tokens: Tensor, index: Tensor, positions: Tensor, length: int) -> Tensor:
    """`plug_back` of arguments that were checked, all but the numbers in `index`."""
    check_range("index", index, tokens.shape[0])
    if looks(index) and looks(positions):
        places = torch.arange(len(index), device=index.device)
        if not torch.equal(positions[index] // length, places // length):
            raise ValueError("index: needs tokens of the position's own sample")
    reason = None if tokens.dtype in _TYPES else f"{tokens.dtype}"
    if not choose("plug_back", reason, False, tokens, index):
        return plug_back_reference(tokens, index)
    if direct(tokens):
        from fastgen.kernels.dechunk.triton import launch_plug_back

        return launch_plug_back(tokens, index)
    spread: Tensor = torch.ops.fastgen.plug_back(tokens, index, positions, length)
    return spread


def plug_back_reference(tokens: Tensor, index: Tensor) -> Tensor:
    """The specification of `plug_back`."""
    return tokens.index_select(0, index)


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
    """Kept tokens to every grid position: smoothing, then plug-back.

    Args:
        tokens: [T, D], kept tokens, sample after sample, each in raster order.
        positions: int64 [T], sample * L + index, ascending.
        probabilities: boundary probabilities of all positions, [n, L], float32.
        mask: bool [n, L], kept positions.
        grid: (H, W) with H * W = L.
        sigma: width of the smoothing Gaussian in grid units; None leaves smoothing out.
        rows: int64 [n, L], kept positions at or before each one, less one (`Packing.rows`); None computes it.
        full: False where some of the T are behind the last token: their positions are -1, their values anything.

    Returns:
        [n, L, D].

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes, dtypes, devices or numbers that do not fit; see `smooth_kept` and `plug_back`.
    """
    needed = {"tokens": tokens, "positions": positions, "probabilities": probabilities, "mask": mask}
    check_tensors(needed, {"rows": rows})
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask: needs bool [n, L], got {shown(mask)}")
    samples, length = mask.shape
    _check_grid(grid, samples, 1.0 if sigma is None else sigma, full)
    _check_packed(tokens, positions, probabilities)
    height, width = grid
    if height * width != length or probabilities.shape != mask.shape or len(tokens) != len(positions):
        raise ValueError(
            f"dechunk: grid {grid}, mask {tuple(mask.shape)}, probabilities {tuple(probabilities.shape)}, "
            f"{len(tokens)} tokens at {len(positions)} positions do not fit"
        )
    check_ascending("positions", positions, samples * length, full)
    # From a flat grid position to the row of its token.
    rows = mask.flatten().cumsum(0) - 1 if rows is None else rows.flatten()
    index = nearest_kept(mask.view(samples, height, width), rows).flatten()  # it checks `rows`
    if sigma is not None:
        kept = probabilities.flatten().index_select(0, positions if full else positions.clamp_min(0))
        tokens = _smoothed(tokens, positions, kept, grid, samples, sigma, rows, full)
    return _spread(tokens, index, positions, length).view(samples, length, tokens.shape[1])


def _check_grid(grid: tuple[int, int], samples: int, sigma: float, full: bool) -> int:
    """See that these fit; positions of all samples."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"grid: needs (H, W), got {grid!r}")
    for side in grid:
        check_int("grid", side, 1)
    check_int("samples", samples, 0)
    check_number("sigma", sigma, above=0)
    check_flag("full", full)
    return samples * grid[0] * grid[1]


def _check_packed(tokens: Tensor, positions: Tensor, probabilities: Tensor | None = None) -> None:
    """See that dtypes of packed tokens fit."""
    if not tokens.is_floating_point():
        raise ValueError(f"tokens: need floats [T, D], got {shown(tokens)}")
    if positions.dtype != torch.int64:
        raise ValueError(f"positions: need int64 [T], got {shown(positions)}")
    wanted = {torch.float32, torch.promote_types(tokens.dtype, torch.float32)}  # a router gives float32
    if probabilities is not None and probabilities.dtype not in wanted:
        raise ValueError(f"probabilities: need float32 (or float64 for such tokens), got {shown(probabilities)}")


# ---- operators ----


@torch.library.custom_op("fastgen::nearest_kept", mutates_args=())
def _nearest(mask: Tensor, rows: Tensor | None) -> Tensor:
    from fastgen.kernels.dechunk.triton import launch_nearest

    return launch_nearest(mask, rows)


@_nearest.register_fake
def _(mask: Tensor, rows: Tensor | None) -> Tensor:
    return torch.empty(mask.shape, dtype=torch.int64, device=mask.device)


@torch.library.custom_op("fastgen::smooth_kept", mutates_args=())
def _smooth(
    tokens: Tensor, positions: Tensor, probabilities: Tensor, rows: Tensor, height: int, width: int, sigma: float
) -> Tensor:
    from fastgen.kernels.dechunk.triton import launch_smooth

    return launch_smooth(tokens, positions, probabilities, rows, height, width, sigma)


@_smooth.register_fake
def _(tokens: Tensor, *rest: Any) -> Tensor:
    return torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)


@torch.library.custom_op("fastgen::smooth_kept_backward", mutates_args=())
def _smooth_backward(
    grad: Tensor,
    tokens: Tensor,
    positions: Tensor,
    probabilities: Tensor,
    rows: Tensor,
    height: int,
    width: int,
    sigma: float,
) -> tuple[Tensor, Tensor]:
    from fastgen.kernels.dechunk.triton import launch_blur

    def blur(values: Tensor) -> Tensor:
        return launch_blur(values.contiguous(), positions, rows, height, width, sigma)

    # With w_j = max(p_j, tiny), S = G w, m = G (w h) / S and out = p h + (1 - p) m; G is symmetric.
    g, h = grad.float(), tokens.float()
    p = probabilities[:, None]
    weight = p.clamp(min=_TINY)
    there = positions >= 0  # behind the last token anything may lie
    mass = torch.where(there[:, None], blur(weight), 1.0)
    mixed = blur(weight * h) / mass
    passed = (1 - p) / mass * g
    back = blur(torch.cat([passed, (passed * mixed).sum(dim=1, keepdim=True)], dim=1))
    around, lost = back[:, :-1], back[:, -1]
    of_weight = ((h * around).sum(dim=1) - lost) * (probabilities >= _TINY)
    of_p = (g * (h - mixed)).sum(dim=1) + of_weight
    of_tokens = torch.where(there[:, None], p * g + weight * around, 0.0).to(tokens.dtype)
    return of_tokens, torch.where(there, of_p, 0.0)


@_smooth_backward.register_fake
def _(grad: Tensor, tokens: Tensor, positions: Tensor, probabilities: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tokens), torch.empty_like(probabilities)


def _setup_smooth(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, positions, probabilities, rows, *ctx.numbers = inputs
    ctx.save_for_backward(tokens, positions, probabilities, rows)


def _backward_smooth(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_tokens, of_p = torch.ops.fastgen.smooth_kept_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return of_tokens, None, of_p, None, None, None, None


_smooth.register_autograd(_backward_smooth, setup_context=_setup_smooth)


@torch.library.custom_op("fastgen::plug_back", mutates_args=())
def _plug_back(tokens: Tensor, index: Tensor, positions: Tensor, length: int) -> Tensor:
    from fastgen.kernels.dechunk.triton import launch_plug_back

    return launch_plug_back(tokens, index)


@_plug_back.register_fake
def _(tokens: Tensor, index: Tensor, positions: Tensor, length: int) -> Tensor:
    return tokens.new_empty(index.shape[0], tokens.shape[1])


@torch.library.custom_op("fastgen::plug_back_backward", mutates_args=())
def _plug_back_backward(grad: Tensor, index: Tensor, positions: Tensor, length: int) -> Tensor:
    from fastgen.kernels.dechunk.triton import launch_sum_back

    return launch_sum_back(grad, index, positions, length)


@_plug_back_backward.register_fake
def _(grad: Tensor, index: Tensor, positions: Tensor, length: int) -> Tensor:
    return grad.new_empty(positions.shape[0], grad.shape[1])


def _setup_plug(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, positions, ctx.length = inputs
    ctx.save_for_backward(index, positions)


def _backward_plug(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.fastgen.plug_back_backward(grad, *ctx.saved_tensors, ctx.length), None, None, None


_plug_back.register_autograd(_backward_plug, setup_context=_setup_plug)
