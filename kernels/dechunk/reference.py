"""Reference implementation of de-chunking's steps, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TINY", "nearest_kept_reference", "smooth_kept_reference"]

TINY = 1e-12
_TOGETHER = {"cpu": 2**21}
"""Elements of one temporary: at most 16 MiB on a CPU; on a GPU `_AT_ONCE`, for fewer launches."""
_AT_ONCE = 2**25


def nearest_kept_reference(mask: Tensor, rows: Tensor | None = None) -> Tensor:
    """Reference implementation of `nearest_kept`. Memory: H * W * W integers per sample, at most about 2^21 at
    once."""
    n, height, width = mask.shape
    if rows is not None:
        starts = height * width * torch.arange(n, device=mask.device)[:, None, None]
        return rows[nearest_kept_reference(mask) + starts]
    together = max(1, _most(mask) // max(1, height * width * width))
    if n > together:
        return torch.cat([nearest_kept_reference(part) for part in mask.split(together)])
    rows = torch.arange(height, device=mask.device)[:, None].expand(height, width)
    far = 2 * (height + width)  # farther than anything on the grid
    # Within each column: the last kept row at or above, and the first one at or below.
    above = torch.where(mask, rows, -far).cummax(dim=1).values
    below = torch.where(mask, rows, height + far).flip(1).cummin(dim=1).values.flip(1)
    up, down = rows - above, below - rows
    row = torch.where(up <= down, above, below)  # a tie goes to the lower index
    gap = torch.minimum(up, down).clamp(max=far)
    columns = torch.arange(width, device=mask.device)
    across = (columns[:, None] - columns[None, :]).square()  # [W, W']
    index = row * width + columns
    # Squared distance first, index second, in one integer; a column without a kept row is too far away to win.
    size = height * width
    key = (across + gap.square()[:, :, None, :]) * size + index.clamp(0, size - 1)[:, :, None, :]
    winner: Tensor = key.amin(dim=-1) % size
    return winner


def smooth_kept_reference(
    tokens: Tensor,
    positions: Tensor,
    probabilities: Tensor,
    grid: tuple[int, int],
    samples: int,
    sigma: float,
    full: bool = True,
) -> Tensor:
    """Reference implementation of `smooth_kept`, in groups of channels with temporaries of about 2^21 elements."""
    probabilities = probabilities.to(torch.promote_types(probabilities.dtype, tokens.dtype))  # a model in float64
    weight = probabilities.clamp(min=TINY)[:, None]
    height, width = grid
    size = samples * height * width
    vertical, horizontal = (_gaussian(side, sigma, weight) for side in grid)
    if not full:  # an extra row collects the padding after the last token
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
