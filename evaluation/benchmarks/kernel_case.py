"""A case of the benchmark of kernels: one operation at one size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Case", "Inputs", "close", "equal", "noise", "size_of"]

Inputs = Mapping[str, Any]
"""Arguments of an operation, by name."""
Check = Callable[[Any, Any], str | None]
"""(result, expected) -> None if they agree, else the difference."""


@dataclass(frozen=True, slots=True)
class Case:
    """An operation at one size.

    Attributes:
        op: its name.
        size: label, e.g. "DiT-XL 256 tokens x 8".
        build: seeded inputs on a device; everything `run` and `reference` need, and nothing is random after it.
        run: the operation, called with the inputs by name; the benchmark chooses the mode by `use_kernels`.
        reference: its reference, called with the same inputs.
        moved: bytes that must be read and written, from the inputs.
        check: compares the results of the kernel with `expect` before anything is timed.
        expect: what the result is compared with; None: the reference on the same inputs, floats widened to float32.
        flops: of the operation, where arithmetic and not memory is the limit.
        large: whether the share of the roofline counts here.
        on_cpu: small enough to be measured on a CPU.
        compiled: whether a compiled reference makes sense (False where it cannot be compiled).
    """

    op: str
    size: str
    build: Callable[[torch.device], Inputs]
    run: Callable[..., Any]
    reference: Callable[..., Any]
    moved: Callable[[Inputs], int]
    check: Check
    expect: Callable[..., Any] | None = None
    flops: Callable[[Inputs], int] | None = None
    large: bool = False
    on_cpu: bool = False
    compiled: bool = True


def noise(device: torch.device, *shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers, equal from run to run on one kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def size_of(*tensors: Tensor | None) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def close(rms: float = 6e-3) -> Check:
    """Floats agree up to RMS of the difference / RMS of the expected, and are finite."""

    def check(result: Any, expected: Any) -> str | None:
        for index, (actual, wanted) in enumerate(zip(_flat(result), _flat(expected), strict=True)):
            if actual.shape != wanted.shape:
                return f"result {index}: shape {tuple(actual.shape)}, needs {tuple(wanted.shape)}"
            if not wanted.numel():
                continue
            actual, wanted = actual.float(), wanted.float()
            if not bool(actual.isfinite().all()):
                return f"result {index}: not finite"
            size = wanted.square().mean().sqrt().clamp(min=1e-30)
            ratio = float((actual - wanted).square().mean().sqrt() / size)
            if ratio > rms:
                return f"result {index}: RMS ratio {ratio:.2g}, bound {rms:.2g}"
        return None

    return check


def equal(result: Any, expected: Any) -> str | None:
    """All results are equal."""
    for index, (actual, wanted) in enumerate(zip(_flat(result), _flat(expected), strict=True)):
        if actual.shape != wanted.shape or not bool((actual == wanted).all()):
            return f"result {index}: differs"
    return None


def _flat(result: Any) -> Sequence[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]
