"""What tests of kernels share: a named error metric, poisoned memory, and views of every layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where kernels run: on a GPU, else under Triton's interpreter."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# dtype -> (RMS of the difference / RMS of the oracle, units in the last place) for a result that is computed in
# float32 and rounded once. The interpreter truncates to bfloat16 where a GPU rounds, so the bound is a whole unit.
BOUNDS = {
    torch.float64: (1e-12, 4096.0),
    torch.float32: (2e-6, 32.0),
    torch.float16: (6e-4, 1.01),
    torch.bfloat16: (6e-3, 1.01),
}


def rms_ratio(actual: Tensor, oracle: Tensor, floor: float = 0.0) -> float:
    """RMS of the difference / RMS of the oracle, or `floor` where that is more; the plain RMS of the difference where
    both are zero."""
    difference = (actual.double() - oracle.double()).square().mean().sqrt()
    size = oracle.double().square().mean().sqrt().clamp_min(floor)
    return float(difference / size if size > 0 else difference)


def ulps(actual: Tensor, oracle: Tensor, dtype: torch.dtype) -> Tensor:
    """Element-wise difference in units in the last place of `dtype` at the size of the oracle's element.

    For small elements at the oracle's RMS (half precision, with sums in float32: at a tenth of it), since sums cannot
    be more exact than their terms.
    """
    oracle = oracle.double()
    share = 0.1 if dtype in (torch.float16, torch.bfloat16) else 1.0
    size = oracle.abs().clamp(min=share * float(oracle.square().mean().sqrt()) + 1e-30)
    # The unit between two powers of two is that of the lower one.
    unit = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(size)))
    return (actual.double() - oracle).abs() / unit


def assert_matches(
    actual: Tensor,
    oracle: Tensor,
    name: str = "result",
    *,
    rms: float | None = None,
    ulp: float | None = None,
    dtype: torch.dtype | None = None,
    terms: float = 0.0,
) -> None:
    """Compare with an oracle computed in float64, by the bounds of the dtype of `actual` unless others are given.

    Args:
        actual: what the kernel made.
        oracle: float64, same shape.
        name: for the message.
        rms, ulp: bounds instead of those of the table; `ulp` may be infinite.
        dtype: take the bounds of this dtype (where inputs were rounded to it).
        terms: size of the terms of sums that may cancel; an RMS of the difference of one rounding of them is allowed.
    """
    dtype = dtype or actual.dtype
    bounds = BOUNDS[dtype]
    rms, ulp = (bounds[0] if rms is None else rms), (bounds[1] if ulp is None else ulp)
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, needs {tuple(oracle.shape)}"
    if actual.numel() == 0:
        return
    actual, oracle = actual.detach().cpu(), oracle.detach().cpu()
    wrong = ~torch.isfinite(actual) & torch.isfinite(oracle)
    assert not wrong.any(), f"{name}: not finite at {_first(wrong)}"
    floor = torch.finfo(dtype).eps * terms / rms if terms else 0.0
    ratio, distance = rms_ratio(actual, oracle, floor), ulps(actual, oracle, dtype)
    worst = float(distance.max())
    if ratio > rms or worst > ulp:
        bad = distance > ulp if worst > ulp else distance > 0.5 * worst
        index = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name} {dtype} {tuple(actual.shape)}: RMS ratio {ratio:.3g} (bound {rms:.3g}), {worst:.3g} ulp (bound "
            f"{ulp:.3g}); {int(bad.sum())} bad, first at {_first(bad)}: {actual[index].item()!r}, "
            f"needs {oracle[index].item()!r}"
        )


def _first(bad: Tensor, count: int = 5) -> list[tuple[int, ...]]:
    return [tuple(index.tolist()) for index in bad.nonzero()[:count]]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what `torch.empty` and its relatives give with NaN (integers: a far negative number), so that a kernel that
    leaves a part unwritten, or reads it, is caught."""
    # The first device context remembers which functions make tensors: they must be torch's own, or `torch.device` as a
    # context has no effect on them for the rest of the process.
    with torch.device("meta"):
        torch.empty(0)
    names = ("empty", "empty_like", "empty_strided")
    plain = {name: getattr(torch, name) for name in names}
    new_empty = Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.is_meta or not tensor.numel():
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(-(2**30))
        return tensor

    def wrap(function: Any) -> Any:
        return lambda *args, **kwargs: poison(function(*args, **kwargs))

    for name, function in plain.items():
        setattr(torch, name, wrap(function))
    Tensor.new_empty = wrap(new_empty)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(torch, name, function)
        Tensor.new_empty = new_empty  # type: ignore[method-assign]


LAYOUTS = ("contiguous", "row_stride", "misaligned", "slice", "inner_stride", "transposed", "huge_stride")
"""As it should be; rows further apart than they are long; a start that no 16-byte access fits; a part of wider rows;
every second element; the first two axes exchanged in memory; rows a megabyte apart."""


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values [..., D] in a view of the given layout; what lies between them is NaN (zero for integers)."""
    width = x.shape[-1] if x.ndim else 1
    if layout == "contiguous" or x.ndim == 0 or x.numel() == 0:
        return x.contiguous()
    if layout == "row_stride":
        view = _filled(x, (*x.shape[:-1], width + 8))[..., :width]
    elif layout == "misaligned":
        view = _filled(x, (x.numel() + 1,))[1:].view(x.shape)
    elif layout == "slice":
        view = _filled(x, (*x.shape[:-1], 3 * width + 1))[..., width : 2 * width]
    elif layout == "inner_stride":
        view = _filled(x, (*x.shape[:-1], 2 * width))[..., ::2]
    elif layout == "transposed":
        if x.ndim < 2:
            return x.contiguous()
        view = _filled(x, (x.shape[1], x.shape[0], *x.shape[2:])).transpose(0, 1)
    elif layout == "huge_stride":
        rows = x.numel() // width
        if rows > 16:
            return lay_out(x, "row_stride")
        far = 2**20 // x.element_size()
        storage = torch.zeros(rows * far, dtype=x.dtype, device=x.device)
        view = storage.as_strided(x.shape, [*(far * stride // width for stride in x.contiguous().stride()[:-1]), 1])
    else:
        raise ValueError(f"layout: {layout!r} is unknown")
    view.copy_(x)
    return view


def _filled(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, float("nan") if x.is_floating_point() else 0, dtype=x.dtype, device=x.device)


def layouts(*names: str) -> st.SearchStrategy[str]:
    """Strategy of layouts for `lay_out`, all unless named."""
    return st.sampled_from(names or LAYOUTS)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers on `DEVICE`, equal on every device."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(dtype).to(DEVICE)
