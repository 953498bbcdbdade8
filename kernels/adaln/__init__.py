"""Gated residual, norm and modulation in one pass (adaptive layer norm of DiT, arXiv 2212.09748, and of Z-Image).

    y = hidden + g(gate) * u(update)            g: identity or tanh; u: identity or a weighted RMS norm
    z = norm(y) * weight + bias, times (1 + scale), plus shift

Every part is optional. DiT, FLUX, SD3 and Qwen-Image use a layer norm without weights and plain gates; Z-Image uses
weighted RMS norms on both sides ("sandwich"), tanh gates and no shift. Loss contract: exact, up to rounding; the
kernel computes in float32 and rounds y and z once. On CUDA it replaces the separate kernels of eager PyTorch, without
recompiling when token counts change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.checks import check_bool
from fastgen.kernels.adaln.operator import launch
from fastgen.kernels.adaln.reference import adaln_reference, rms_norm
from fastgen.kernels.arguments import check_number, check_shape, check_tensors, shown
from fastgen.kernels.dispatch import (
    Checked,
    check_cu_seqlens,
    check_range,
    checks_values,
    choose,
    direct,
    needs_gradients,
)

__all__ = ["adaln", "adaln_reference", "can_use_triton", "rms_norm"]

NORMS = ("layer", "rms", "none")
_CONDITIONING = ("gate", "scale", "shift")
_WEIGHTS = ("weight", "bias", "update_weight")
_TENSORS = ("hidden", "update", *_CONDITIONING, *_WEIGHTS, "sequence_ids", "cu_seqlens")
_OPTIONS = ("norm", "eps", "update_norm", "update_eps", "tanh_gate")
_checked = Checked()
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int32, torch.int64)
_MAX_WIDTH = 16384


def adaln(
    hidden: Tensor,
    *,
    update: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    update_weight: Tensor | None = None,
    update_norm: bool = False,
    update_eps: float = 1e-6,
    tanh_gate: bool = False,
    sequence_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum y and its modulated norm z; see the top of this file.

    Args:
        hidden: residual stream, padded [n, L, D] or packed [T, D].
        update: added to it, same shape; None: y is `hidden` itself.
        gate, scale, shift: [n, D] (or [1, D] for all samples, packed or padded), with any row stride, as `chunk`
            returns them.
        weight, bias: [D], of the norm of y.
        norm: "layer", "rms" or "none" (then z is y).
        eps: of the norm of y.
        update_weight: [D], of the RMS norm of the update.
        update_norm: normalise the update (RMS) before the gate.
        update_eps: of that norm.
        tanh_gate: apply tanh to the gate.
        sequence_ids: int [T], sample of each row of a packed `hidden`, 0 … n - 1.
        cu_seqlens: int [n + 1], start of each sequence and T, if the sequences are contiguous; then backward need not
            sort.

    Returns:
        y and z, in the shape of `hidden` and the promoted dtype of their inputs.

    Raises:
        TypeError: an argument that must be a tensor is not one.
        ValueError: shapes, dtypes, devices or numbers that do not fit, naming the argument. Numbers in `sequence_ids`
            and `cu_seqlens` are checked on a CPU, and with FASTGEN_KERNELS_DEBUG=1 on a GPU.
    """
    options = (norm, eps, update_norm, update_eps, tanh_gate)
    tensors: tuple[Any, ...]
    tensors = (hidden, update, gate, scale, shift, weight, bias, update_weight, sequence_ids, cu_seqlens)
    reason, count = _checked(lambda: _check(tensors, *options), tensors, *options)
    if sequence_ids is not None:
        _check_values(sequence_ids, cu_seqlens, hidden.shape[0], count)
        if count == 1:  # one row for all samples: no look-up, and gradients of that row
            sequence_ids = cu_seqlens = None
        elif count is not None:
            gate, scale, shift = (
                x if x is None or x.shape[0] != 1 else x.expand(count, -1) for x in (gate, scale, shift)
            )
        tensors = (hidden, update, gate, scale, shift, weight, bias, update_weight, sequence_ids, cu_seqlens)
    given = [x for x in tensors if x is not None]
    if not choose("adaln", reason, _whole(update, norm) or not torch.compiler.is_compiling(), *given):
        named: dict[str, Any] = dict(zip(_TENSORS[:-1], tensors[:-1], strict=True))
        named.update(zip(_OPTIONS, options, strict=True))
        return adaln_reference(**named)
    operator: Any = launch
    if not direct(*tensors):
        # Inductor (torch 2.11) fails on some graphs with a visible kernel that omits one of its results.
        visible = _whole(update, norm) and not needs_gradients(*tensors)
        operator = torch.ops.fastgen.adaln_visible if visible else torch.ops.fastgen.adaln
    summed, normed = operator(*tensors, *options)
    if update is None:
        summed = hidden
    return summed, summed if norm == "none" else normed


def _whole(update: Tensor | None, norm: str) -> bool:
    """Whether there is a sum and a norm of it: compilers fuse either one alone themselves."""
    return update is not None and norm != "none"


def can_use_triton(hidden: Tensor, **others: Tensor | None) -> bool:
    """Whether the kernel supports these tensors of `adaln`, on any device."""
    return _why_not(hidden, *others.values()) is None


def _check(
    tensors: tuple[Any, ...], norm: str, eps: float, update_norm: bool, update_eps: float, tanh_gate: bool
) -> tuple[str | None, int | None]:
    """Check the arguments. Returns why the kernel does not support them, or None, and the rows of conditioning."""
    named = dict(zip(_TENSORS, tensors, strict=True))
    hidden, update, ids = named.pop("hidden"), named["update"], named["sequence_ids"]
    check_tensors({"hidden": hidden}, named)
    if norm not in NORMS:
        raise ValueError(f"norm: {norm!r} is unknown; choose one of {', '.join(NORMS)}")
    for name, number in (("eps", eps), ("update_eps", update_eps)):
        check_number(name, number, minimum=0)
    for name, flag in (("update_norm", update_norm), ("tanh_gate", tanh_gate)):
        check_bool(name, flag)
    if update is None and named["gate"] is not None:
        raise ValueError("gate: is unused without update")
    if hidden.ndim not in (2, 3) or not hidden.is_floating_point():
        raise ValueError(f"hidden: needs floats [n, L, D] or [T, D], got {shown(hidden)}")
    if update is not None and (update.shape != hidden.shape or not update.is_floating_point()):
        raise ValueError(f"update: needs floats {tuple(hidden.shape)}, got {shown(update)}")
    for name in _WEIGHTS:
        check_shape(name, named[name], hidden.shape[-1:])
    if named["update_weight"] is not None and not update_norm:
        raise ValueError("update_weight: is unused without update_norm")
    count = _check_conditioning(hidden, {name: named[name] for name in _CONDITIONING}, ids is not None)
    _check_indices(hidden, ids, named["cu_seqlens"], count)
    return _why_not(*tensors[:8]), count


def _check_conditioning(hidden: Tensor, vectors: dict[str, Tensor | None], packed: bool) -> int | None:
    """Check gate, scale and shift. Returns their number of rows, or None without any of them."""
    samples = hidden.shape[0] if hidden.ndim == 3 else None
    count: int | None = None
    for name, x in vectors.items():
        check_shape(name, x, ("n", hidden.shape[-1]))
        # Sizes may be symbolic: comparisons, no sets.
        if x is None or (x.shape[0] == 1 and count is not None):
            continue
        if not packed and x.shape[0] != 1 and x.shape[0] != samples:
            raise ValueError(f"{name}: needs {samples or 1} rows, got {tuple(x.shape)}")
        if packed and count is not None and count != 1 and x.shape[0] != count:
            raise ValueError(f"gate, scale, shift: need one number of sequences, or 1; got {count} and {x.shape[0]}")
        count = x.shape[0]
    return count


def _check_indices(hidden: Tensor, ids: Tensor | None, cu_seqlens: Tensor | None, count: int | None) -> None:
    """Check `sequence_ids` and `cu_seqlens` without reading their values."""
    if ids is not None:
        if hidden.ndim != 2 or ids.shape != hidden.shape[:1]:
            raise ValueError(
                f"sequence_ids: needs one number for each row of a packed [T, D]; got {tuple(ids.shape)} for "
                f"{tuple(hidden.shape)}"
            )
        if ids.dtype not in _INTEGERS:
            raise ValueError(f"sequence_ids: needs int32 or int64, got {ids.dtype}")
    if cu_seqlens is not None:
        if ids is None:
            raise ValueError("cu_seqlens: is unused without sequence_ids")
        fits = cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 2 and cu_seqlens.dtype in _INTEGERS
        if not fits or (count is not None and count != 1 and cu_seqlens.shape[0] != count + 1):
            raise ValueError(f"cu_seqlens: needs int32 or int64 [n + 1], got {shown(cu_seqlens)}")


def _check_values(sequence_ids: Tensor, cu_seqlens: Tensor | None, tokens: int, count: int | None) -> None:
    """Check the values of index tensors, if `checks_values` says so."""
    if cu_seqlens is not None:
        count = cu_seqlens.shape[0] - 1
    elif count == 1:  # for any number of sequences
        count = None
    check_range("sequence_ids", sequence_ids, 2**31 if count is None else count)
    if cu_seqlens is None:
        return
    check_cu_seqlens(cu_seqlens, tokens)
    if checks_values(cu_seqlens) and checks_values(sequence_ids):
        numbers = torch.arange(len(cu_seqlens) - 1, dtype=sequence_ids.dtype, device=sequence_ids.device)
        if not torch.equal(numbers.repeat_interleave(cu_seqlens.diff(), output_size=tokens), sequence_ids):
            raise ValueError("cu_seqlens: contradicts sequence_ids, needs the bounds of their runs")


def _why_not(*tensors: Tensor | None) -> str | None:
    """Why the kernel does not support these tensors, or None."""
    for x in tensors:
        if x is None:
            continue
        if x.dtype not in _TYPES:
            return f"it takes float32, float16 and bfloat16, not {x.dtype}"
        if x.shape[-1] > _MAX_WIDTH:
            return f"it takes at most {_MAX_WIDTH} channels, not {x.shape[-1]}"
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            return "it takes tensors whose last axis is contiguous"
    return None
