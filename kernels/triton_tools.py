"""What launchers of Triton kernels share."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastgen.kernels.dispatch import Bounded, interpreted, plain

__all__ = ["cdiv", "power_of_two", "precise", "run_kernel", "tile"]


def cdiv(number: int, by: int) -> int:
    """number / by, rounded up. (Triton's own takes ten times as long on the host.)"""
    return -(-number // by)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less; a size that is a symbol of a compiler becomes a number."""
    return 1 << max(0, int(number) - 1).bit_length()


def precise() -> str:
    """The `input_precision` of a matrix product that is as good as float32's, and the fastest such one."""
    if interpreted():
        return "ieee"
    return "tf32x3" if triton.runtime.driver.active.get_current_target().backend == "cuda" else "ieee"


def tile(width: int, numbers: int = 4096) -> tuple[int, int]:
    """Columns and rows of a tile of about `numbers` numbers for rows of `width`: the widest power of two that leaves
    an eighth of the columns idle or less."""
    block = max(16, min(power_of_two(width), 2048))
    while block > 128 and cdiv(width, block) * block > 1.125 * width:
        block //= 2
    return block, max(1, numbers // block)


class _Kernel:
    """What a kernel was compiled to, by all that Triton makes a version of its own for, and more.

    Its first parameters are tensors or None, the others numbers. Of tensors, dtype and alignment matter; numbers are
    taken as they are, which finds a version faster than to ask which of them are 1 or multiples of 16.
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

    Triton takes as long to find the version of a kernel that fits its arguments as many kernels run. Here it is looked
    up, and started as Triton documents it for kernels that were compiled before. While a compiler traces, the kernel
    becomes a part of its graph.

    Args:
        kernel: of `triton.jit`.
        grid: of one to three axes.
        arguments: the first parameters of the kernel in their order: tensors (the first one) or None, then numbers. A
            parameter is an integer in every call, or a float in every call.
        options: its other parameters, and options of Triton such as `num_warps`; at one place in the code always the
            same ones.
    """
    first = arguments[0]
    if not isinstance(kernel, JITFunction):  # the interpreter
        kernel[grid](*arguments, **options)
    elif not plain(first):
        torch.library.wrap_triton(kernel)[grid](*arguments, **options)
    elif not first.is_cuda:  # compiled for a GPU that is not here
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
