"""What launchers of Triton kernels share."""

from __future__ import annotations

import os

import triton

__all__ = ["precise", "tile"]


def precise() -> str:
    """The `input_precision` of a matrix product that is as good as float32's, and the fastest such one."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "ieee"
    return "tf32x3" if triton.runtime.driver.active.get_current_target().backend == "cuda" else "ieee"


def tile(width: int, numbers: int = 4096) -> tuple[int, int]:
    """Columns and rows of a tile of about so many numbers for rows of `width`: the widest power of two that leaves an
    eighth of the columns idle or less."""
    block = max(16, min(triton.next_power_of_2(width), 2048))
    while block > 128 and triton.cdiv(width, block) * block > 1.125 * width:
        block //= 2
    return block, max(1, numbers // block)
