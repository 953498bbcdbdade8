"""Which implementation of an operation runs: its Triton kernel or its plain PyTorch reference.

    FASTGEN_KERNELS=auto        the kernel if it can run and is faster (default)
    FASTGEN_KERNELS=triton      always the kernel; an error if it cannot run
    FASTGEN_KERNELS=reference   always PyTorch

    with use_kernels("reference"):
        ...

    FASTGEN_KERNELS_DEBUG=1     check the values of index tensors on GPUs too, which synchronises with the GPU

Triton is optional: without it (Windows, macOS) the references run. Its interpreter (``TRITON_INTERPRET=1``) runs
kernels on a CPU, about a thousand times slower, and only in mode "triton". A compiled graph (`torch.compile`) keeps
the choice that was made while it was traced.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgen.accounting import note_path

__all__ = [
    "MODES",
    "Bounded",
    "Checked",
    "active",
    "check_ascending",
    "check_cu_seqlens",
    "check_range",
    "choose",
    "direct",
    "has_triton",
    "interpreted",
    "kernels_mode",
    "checks_values",
    "needs_gradients",
    "plain",
    "ran",
    "reset_ran",
    "triton_runs",
    "use_kernels",
]

logger = logging.getLogger(__name__)

MODES = ("auto", "triton", "reference")
_VARIABLE = "FASTGEN_KERNELS"
_mode: ContextVar[str | None] = ContextVar("fastgen_kernels", default=None)
_ran: dict[str, str] = {}
_logged: set[tuple[str, str, str | None]] = set()
_lock = threading.Lock()
T = TypeVar("T")


def kernels_mode() -> str:
    """The current mode: of the innermost `use_kernels`, else the variable FASTGEN_KERNELS, else "auto".

    Raises:
        ValueError: the variable has an unknown value.
    """
    mode = _mode.get()
    return _checked(_VARIABLE, os.environ.get(_VARIABLE) or "auto") if mode is None else mode


@contextmanager
def use_kernels(mode: str) -> Iterator[None]:
    """Run operations in this context (thread or task) in a mode; overrides FASTGEN_KERNELS.

    Raises:
        ValueError: `mode` is not one of "auto", "triton" and "reference".
    """
    token = _mode.set(_checked("mode", mode))
    try:
        yield
    finally:
        _mode.reset(token)


def triton_runs(tensor: Tensor) -> bool:
    """Whether Triton kernels can run on this tensor: it is on a GPU (CUDA, ROCm), or the interpreter is on."""
    return has_triton() and (tensor.is_cuda or interpreted())


def active(tensor: Tensor) -> bool:
    """Whether device and mode allow kernels to run on this tensor."""
    return _active(tensor.is_cuda)


@torch.compiler.assume_constant_result
def _active(on_gpu: bool) -> bool:
    mode = kernels_mode()
    return mode != "reference" and has_triton() and (on_gpu or (mode == "triton" and interpreted()))


def choose(op: str, supported: str | None, default: bool | str = True, *tensors: Tensor) -> bool:
    """Whether the Triton kernel of an operation runs instead of its reference. Records the choice.

    Args:
        op: name of the operation.
        supported: None if the kernel supports these arguments, else why not.
        default: whether "auto" takes the kernel for these sizes; False if it is slower, a string for another reason.
        tensors: all tensors that the kernel reads or writes.

    Raises:
        ValueError: the mode is "triton" and the kernel cannot run; the message says why.
    """
    # Not `bool(tensors)`: Dynamo of torch 2.11 cannot trace it.
    on_gpu = len(tensors) > 0 and tensors[0].is_cuda
    if on_gpu and supported is None:
        device = tensors[0].device
        for tensor in tensors[1:]:
            if tensor.device != device:
                supported = "its tensors are on several devices"
    return _decide(op, supported, default, on_gpu)


# A constant for compilers: this cannot be traced, and a graph keeps its choice.
@torch.compiler.assume_constant_result
def _decide(op: str, reason: str | None, default: bool | str, on_gpu: bool) -> bool:
    mode = kernels_mode()
    if mode == "reference":
        reason = "FASTGEN_KERNELS=reference"
    elif reason is None and not has_triton():
        reason = "Triton is not installed"
    elif reason is None and not on_gpu and not (mode == "triton" and interpreted()):
        reason = "Triton needs a GPU"
    elif reason is None and default is not True and mode == "auto":
        reason = default or "it is faster for this size"
    if reason is not None and mode == "triton":
        raise ValueError(f"{op}: the Triton kernel cannot run: {reason}")
    _report(op, "triton" if reason is None else "reference", reason)
    return reason is None


def direct(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be launched directly, without the overhead of its registered operator.

    Compilers, autograd and tensor subclasses need the operator.
    """
    if torch.compiler.is_compiling():
        return False
    if needs_gradients(*tensors):
        return False
    return all(tensor is None or plain(tensor) for tensor in tensors)


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd needs gradients of one of them."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def plain(tensor: Tensor) -> bool:
    """Whether this is a plain tensor: neither a subclass nor a fake tensor of a trace."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


class Bounded(dict[Any, Any]):
    """A cache that is cleared before it grows beyond `MOST` entries."""

    MOST = 4096

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) >= self.MOST:
            self.clear()
        super().__setitem__(key, value)


class Checked:
    """Cached results of argument checks, so that calls with equal shapes are checked once.

    A check takes as long as a small kernel. Results may depend only on shapes, strides, dtypes, devices and whether
    gradients are needed; errors are not cached.
    """

    def __init__(self) -> None:
        self._found = Bounded()

    def __call__(self, check: Callable[[], T], tensors: Iterable[Tensor | None], *options: object) -> T:
        """The result of `check` for these tensors and options."""
        if torch.compiler.is_compiling():
            return check()
        # True and 1.0 equal 1 but are not integers.
        key: list[object] = [*options, *map(type, options), torch.is_grad_enabled()]
        try:
            for x in tensors:
                key.append(None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.requires_grad, type(x)))
            return self._found[tuple(key)]
        except KeyError:
            pass
        except (AttributeError, TypeError):  # not a tensor, or not hashable: symbolic sizes, lists
            return check()
        found = self._found[tuple(key)] = check()
        return found


def check_range(name: str, index: Tensor, limit: int) -> None:
    """Check that indices are in 0 … limit - 1, if `checks_values` says so.

    Raises:
        ValueError: one is not.
    """
    if not checks_values(index) or not index.numel():
        return
    low, high = (int(end) for end in index.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(f"{name}: needs numbers in 0 … {limit - 1}, got {low if low < 0 else high}")


def check_ascending(positions: Tensor, size: int, full: bool) -> None:
    """Check that positions are in 0 … size - 1 and increase, if `checks_values` says so; without `full` the last ones
    may be -1.

    Raises:
        ValueError: they are not.
    """
    if not checks_values(positions) or not positions.numel():
        return
    if not full:  # without the padding after the last token
        positions = positions[: int((positions != -1).sum())]
    check_range("positions", positions, size)
    if bool((positions[1:] <= positions[:-1]).any()):
        raise ValueError("positions: needs increasing numbers, each position once")


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int, longest: int | None = None) -> None:
    """Check that sequence bounds start at 0, never decrease and end at the token count, if `checks_values` says so.

    Raises:
        ValueError: they do not, or a sequence is longer than `longest` (`max_seqlen`).
    """
    if not checks_values(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in zip(bounds[:-1], bounds[1:], strict=True)):
        shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]]
        raise ValueError(f"cu_seqlens: needs increasing bounds from 0 to {tokens}, got {shown}")
    if longest is not None:
        needed = max(b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True))
        if needed > longest:
            raise ValueError(f"max_seqlen: {longest} is not allowed, the longest sequence has {needed} tokens")


def checks_values(tensor: Tensor) -> bool:
    """Whether to check a tensor's values: on a CPU and in debug mode; otherwise that would stall the GPU."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return False
    return tensor.device.type == "cpu" or (tensor.is_cuda and os.environ.get("FASTGEN_KERNELS_DEBUG") == "1")


def ran() -> dict[str, str]:
    """By operation, "triton" or "reference": whichever ran last, since the start or `reset_ran`."""
    with _lock:
        return dict(_ran)


def reset_ran() -> None:
    """Clear the record of what ran, and log each choice again."""
    with _lock:
        _ran.clear()
        _logged.clear()


def _report(op: str, used: str, reason: str | None) -> None:
    note_path(op, used, reason)
    _ran[op] = used
    key = (op, used, reason)
    if key not in _logged:
        with _lock:
            _logged.add(key)
        if reason is None:  # `note_path` logs the other case
            logger.info("%s: %s runs", op, used)


def _checked(name: str, mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{name}: {mode!r} is unknown; choose one of {', '.join(MODES)}")
    return mode


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"
