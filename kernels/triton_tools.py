"""What launchers of Triton kernels share."""

from __future__ import annotations

import os

import triton

__all__ = ["precise"]


def precise() -> str:
    """The `input_precision` of a matrix product that is as good as float32's, and the fastest such one."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "ieee"
    return "tf32x3" if triton.runtime.driver.active.get_current_target().backend == "cuda" else "ieee"
