"""Argument checks shared by all operations. Errors name the argument; compilers trace these functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen import checks

__all__ = ["check_int", "check_number", "check_shape", "check_tensors", "overlaps", "shown"]


def check_tensors(needed: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> None:
    """Check that all are tensors on one device; optional ones may be None.

    Raises:
        TypeError: one is not a tensor.
        ValueError: one is not on the first one's device.
    """
    first: str | None = None
    device: Any = None
    for named, may_lack in ((needed, False), (optional or {}, True)):
        for name, value in named.items():
            if value is None and may_lack:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: needs a tensor, got {type(value).__name__}")
            if first is None:
                first, device = name, value.device
            elif value.device != device:
                raise ValueError(f"{name}: is on {value.device}, and {first} on {device}; needs one device")


def check_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Check that a number is an integer (not a bool) from `minimum` to `maximum`; skipped while compilers trace.

    Raises:
        ValueError: it has another type, or is out of range.
    """
    if not torch.compiler.is_compiling() and not isinstance(value, torch.SymInt):
        checks.check_integer(name, value, minimum, maximum)


def check_number(
    name: str, value: Any, minimum: float = -math.inf, maximum: float = math.inf, *, above: float = -math.inf
) -> None:
    """Check that a number is finite, from `minimum` to `maximum`, and above `above`; skipped while compilers trace.

    Raises:
        ValueError: it is not.
    """
    if not torch.compiler.is_compiling():
        checks.check_number(name, value, minimum, maximum, above=above)


def check_shape(name: str, x: Tensor | None, shape: Sequence[int | str], *dtypes: torch.dtype) -> None:
    """Check that a tensor has these sizes and one of these dtypes; None passes.

    Args:
        name: of the argument.
        x: its value.
        shape: sizes; a string means any size.
        dtypes: allowed dtypes; none: all floating-point ones.

    Raises:
        ValueError: another shape or dtype.
    """
    if x is None:
        return
    # Sizes may be symbolic, so they are compared one by one.
    fits = x.ndim == len(shape)
    fits = fits and all(isinstance(size, str) or size == x.shape[axis] for axis, size in enumerate(shape))
    if not fits or not (x.dtype in dtypes if dtypes else x.is_floating_point()):
        kinds = " or ".join(map(str, dtypes)) or "floats"
        raise ValueError(f"{name}: needs {kinds} [{', '.join(map(str, shape))}], got {shown(x)}")


def shown(tensor: Tensor) -> str:
    """Dtype and shape, for messages."""
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def overlaps(tensors: Sequence[Tensor]) -> bool:
    """Whether two elements of these tensors share memory, within one tensor or across tensors.

    Exact, except on the meta device, which has no memory. Splits the tensors into contiguous runs and sorts their
    starts.
    """
    starts, ends = [], []
    for x in tensors:
        if not x.numel() or x.is_meta:
            continue
        size = x.element_size()
        steps = sorted((step, length) for step, length in zip(x.stride(), x.shape, strict=True) if length > 1)
        run = 1
        while steps and steps[0][0] == run:
            run *= steps.pop(0)[1]
        begin = torch.tensor([x.data_ptr()], device="cpu")
        for step, length in steps:
            begin = (begin[:, None] + torch.arange(length, device="cpu") * (step * size)).flatten()
        starts.append(begin)
        ends.append(begin + run * size)
    if not starts:
        return False
    order = torch.cat(starts).sort()
    return bool((order.values[1:] < torch.cat(ends)[order.indices][:-1]).any())
