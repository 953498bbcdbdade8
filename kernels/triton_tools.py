"""Helpers shared by the launchers of Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastgen.kernels.dispatch import Bounded, interpreted, plain

__all__ = ["cdiv", "power_of_two", "precise", "run_kernel", "tile"]


def cdiv(number: int, by: int) -> int:
    """number / by, rounded up. (Triton's own is ten times slower on the host.)"""
    return -(-number // by)


def power_of_two(number: int) -> int:
    """The smallest power of two at or above `number`; a symbolic size becomes a number."""
    return 1 << max(0, int(number) - 1).bit_length()


def precise() -> str:
    """The fastest `input_precision` of a matrix product with float32 accuracy."""
    if interpreted():
        return "ieee"
    return "tf32x3" if triton.runtime.driver.active.get_current_target().backend == "cuda" else "ieee"


def tile(width: int, numbers: int = 4096) -> tuple[int, int]:
    """Columns and rows of a tile of about `numbers` elements for rows of `width`: the widest power of two that leaves
    at most an eighth of the columns idle."""
    block = max(16, min(power_of_two(width), 2048))
    while block > 128 and cdiv(width, block) * block > 1.125 * width:
        block //= 2
    return block, max(1, numbers // block)


class _Kernel:
    """Compiled versions of a kernel, by everything that Triton specialises on, and more.

    Its first parameters are tensors or None, the others numbers. The key has the dtype and alignment of tensors, and
    the numbers themselves: that is faster than testing which of them are 1 or multiples of 16.
    """

    def __init__(self, kernel: Any, arguments: tuple[Any, ...]) -> None:
        self.names = kernel.arg_names[len(arguments) :]
        numbers = (index for index, x in enumerate(arguments) if x is not None and not isinstance(x, Tensor))
        self.tensors = next(numbers, len(arguments))
        self.versions = Bounded()

    def key(self, device: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        """Equal only for arguments of the same compiled version."""
        kinds = [None if x is None else (x.dtype, x.data_ptr() & 15 == 0) for x in arguments[: self.tensors]]
        return (device, arguments[self.tensors :], *options.values(), *kinds)


_kernels: dict[int, _Kernel] = {}


def run_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)` on the device of the first argument, with less work on the host.

    Finding the compiled version for some arguments takes Triton as long as many kernels run. Here versions are cached
    and launched as Triton documents it for precompiled kernels. While a compiler traces, the kernel becomes part of
    its graph.

    Args:
        kernel: of `triton.jit`.
        grid: one to three axes.
        arguments: the first parameters of the kernel in order: tensors (at least the first one) or None, then numbers.
            A parameter must always be an integer, or always a float.
        options: its other parameters, and Triton options such as `num_warps`; each call site must always pass the same
            names.
    """
    first = arguments[0]
    if not isinstance(kernel, JITFunction):  # the interpreter
        kernel[grid](*arguments, **options)
    elif not plain(first):
        torch.library.wrap_triton(kernel)[grid](*arguments, **options)
    elif not first.is_cuda:  # compiled for a GPU that this machine lacks
        kernel[grid](*arguments, **options)
    elif first.device.index == torch.cuda.current_device():
        _run(kernel, grid, arguments, options)
    else:
        with torch.cuda.device(first.device):
            _run(kernel, grid, arguments, options)


def _run(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    known = _kernels.get(id(kernel))
    if known is None:
        known = _kernels[id(kernel)] = _Kernel(kernel, arguments)
    key = known.key(arguments[0].device.index, arguments, options)
    version = known.versions.get(key)
    if version is None:
        known.versions[key] = kernel[grid](*arguments, **options)
        return
    whole = (*grid, 1, 1)[:3]
    version[whole](*arguments, *[options[name] for name in known.names])
