"""De-chunking of DC-DiT (specification of arXiv 2603.06351, section "de-chunking"): kept tokens back to the grid.

Two steps: smoothing mixes each kept token with its kept neighbours where the router was unsure, and plug-back gives
every grid position the value of its nearest kept token. Neither ever builds an L x L or M x M array: the Gaussian is
separable, so smoothing is one matrix product per axis, and the nearest kept token is found column by column first.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-12


def nearest_kept(mask: Tensor) -> Tensor:
    """Nearest kept position of every grid position, in Euclidean distance; ties go to the lowest index.

    Args:
        mask: bool [n, H, W], at least one kept position in each grid.

    Returns:
        int64 [n, H, W], row * W + column of the nearest kept position.

    Memory: H * W * W integers a sample, for as many samples at once as stay below 2^24 of them.
    """
    n, height, width = mask.shape
    together = max(1, 2**24 // (height * width * width))
    if n > together:
        return torch.cat([nearest_kept(part) for part in mask.split(together)])
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
    tokens: Tensor, positions: Tensor, probabilities: Tensor, grid: tuple[int, int], samples: int, sigma: float
) -> Tensor:
    """Confidence smoothing: out_i = p_i h_i + (1 - p_i) sum_j W_ij h_j / sum_k W_ik.

    W_ij = exp(-|u_i - u_j|^2 / (2 sigma^2)) p_j over the kept tokens j of the same sample, at grid coordinates u.

    Args:
        tokens: h, [T, D], kept tokens of all samples.
        positions: int64 [T], sample * H * W + row * W + column.
        probabilities: p of the kept tokens, [T], float32.
        grid: (H, W).
        samples: number of samples n.
        sigma: width of the Gaussian in grid units, > 0.

    Returns:
        [T, D] in the dtype of `tokens`.
    """
    height, width = grid
    hidden = tokens.float()
    weight = probabilities.clamp(min=_TINY)[:, None]
    vertical, horizontal = (_gaussian(size, sigma, tokens.device) for size in grid)

    def blurred(values: Tensor) -> Tensor:
        channels = values.shape[1]
        field = values.new_zeros(samples * height * width, channels).index_copy(0, positions, values)
        field = vertical @ field.view(samples, height, width * channels)
        field = horizontal @ field.view(samples * height, width, channels)
        return field.view(-1, channels).index_select(0, positions)

    mixed = blurred(hidden * weight) / blurred(weight)
    confidence = probabilities[:, None]
    return (confidence * hidden + (1 - confidence) * mixed).to(tokens.dtype)


def _gaussian(size: int, sigma: float, device: torch.device) -> Tensor:
    """[size, size] of exp(-(i - j)^2 / (2 sigma^2)), float32."""
    place = torch.arange(size, device=device, dtype=torch.float32)
    return torch.exp((place[:, None] - place[None, :]).square() / (-2 * sigma**2))


def dechunk(
    tokens: Tensor,
    positions: Tensor,
    probabilities: Tensor,
    mask: Tensor,
    grid: tuple[int, int],
    sigma: float | None = 1.0,
) -> Tensor:
    """Kept tokens to every grid position: smoothing, then plug-back.

    Args:
        tokens: [T, D], kept tokens, sample after sample, each in raster order.
        positions: int64 [T], sample * L + index, ascending.
        probabilities: boundary probabilities of all positions, [n, L], float32.
        mask: bool [n, L], kept positions.
        grid: (H, W) with H * W = L.
        sigma: width of the smoothing Gaussian in grid units; None leaves smoothing out.

    Returns:
        [n, L, D].

    Raises:
        ValueError: shapes that do not fit, or sigma <= 0.
    """
    samples, length = mask.shape
    height, width = grid
    if height * width != length or probabilities.shape != mask.shape or len(tokens) != len(positions):
        raise ValueError(
            f"dechunk: grid {grid}, mask {tuple(mask.shape)}, probabilities {tuple(probabilities.shape)}, "
            f"{len(tokens)} tokens at {len(positions)} positions do not fit"
        )
    if sigma is not None and sigma <= 0:
        raise ValueError(f"sigma: needs a number > 0 or None, got {sigma}")
    if sigma is not None:
        kept = probabilities.flatten().index_select(0, positions)
        tokens = smooth_kept(tokens, positions, kept, grid, samples, sigma)
    nearest = nearest_kept(mask.view(samples, height, width)).view(samples, length)
    nearest = nearest + length * torch.arange(samples, device=mask.device)[:, None]
    # From a flat grid position to the row of its token.
    rows = mask.flatten().cumsum(0) - 1
    return tokens.index_select(0, rows[nearest.flatten()]).view(samples, length, tokens.shape[1])
