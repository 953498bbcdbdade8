"""Gated residual, norm and modulation in one pass (adaptive layer norm of DiT, arXiv 2212.09748, and of Z-Image).

    y = hidden + g(gate) * u(update)            g: identity or tanh; u: identity or a weighted RMS norm
    z = norm(y) * weight + bias, times (1 + scale), plus shift

Every part is optional. DiT, FLUX, SD3 and Qwen-Image use a layer norm without weights and plain gates; Z-Image
weighted RMS norms on both sides ("sandwich"), tanh gates and no shift. Loss contract: exact, up to rounding; the
kernel computes in float32 and rounds y and z once. On CUDA it replaces the separate kernels of eager PyTorch, and
needs no new binary when token counts change.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.kernels.adaln.operator import launch
from fastgen.kernels.arguments import check_flag, check_number, check_tensors, shown
from fastgen.kernels.dispatch import Checked, check_cu_seqlens, check_range, choose, direct, looks, needs_gradients

__all__ = ["adaln", "adaln_reference", "can_use_triton", "rms_norm"]

NORMS = ("layer", "rms", "none")
_checked = Checked()
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
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
    """The sum y and its modulated norm z; see the head of this file.

    Args:
        hidden: residual stream, padded [n, L, D] or packed [T, D].
        update: what is added to it, same shape; None: y is `hidden` itself.
        gate, scale, shift: [n, D] (or [1, D] for all samples, packed or padded), any row stride, as `chunk` leaves
            them.
        weight, bias: [D], of the norm of y.
        norm: "layer", "rms" or "none" (then z is y).
        eps: of the norm of y.
        update_weight: [D], of the RMS norm of the update.
        update_norm: normalise the update (RMS) before the gate.
        update_eps: of that norm.
        tanh_gate: the gate's tanh is what gates.
        sequence_ids: int [T], sample of each row of a packed `hidden`, 0 … n - 1.
        cu_seqlens: int [n + 1], start of each sequence and T, where sequences lie one after the other; backward then
            need not sort.

    Returns:
        y and z, in the shape of `hidden`, in the promoted dtype of what they are made of.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes, dtypes, devices or numbers that do not fit, naming the argument. Numbers in `sequence_ids`
            and `cu_seqlens` are looked at on a CPU, and with FASTGEN_KERNELS_DEBUG=1 on a GPU.
    """
    options = (norm, eps, update_norm, update_eps, tanh_gate)
    tensors = (hidden, update, gate, scale, shift, weight, bias, update_weight, sequence_ids, cu_seqlens)
    reason, count = _checked(lambda: _check(*tensors, *options), tensors, *options)
    if sequence_ids is not None:
        _look(sequence_ids, cu_seqlens, hidden.shape[0], count)
        if count == 1:  # one row for all: no look-up, and gradients of that row
            sequence_ids = cu_seqlens = None
        elif count is not None:
            gate, scale, shift = (
                x if x is None or x.shape[0] != 1 else x.expand(count, -1) for x in (gate, scale, shift)
            )
        tensors = (hidden, update, gate, scale, shift, weight, bias, update_weight, sequence_ids, cu_seqlens)
    given = [x for x in tensors if x is not None]
    if not choose("adaln", reason, _whole(update, norm) or not torch.compiler.is_compiling(), *given):
        return adaln_reference(
            hidden,
            update=update,
            gate=gate,
            scale=scale,
            shift=shift,
            weight=weight,
            bias=bias,
            norm=norm,
            eps=eps,
            update_weight=update_weight,
            update_norm=update_norm,
            update_eps=update_eps,
            tanh_gate=tanh_gate,
            sequence_ids=sequence_ids,
        )
    operator: Any = launch
    if not direct(*tensors):
        # Inductor (torch 2.11) fails on some graphs with a visible kernel that leaves one of its results out.
        visible = _whole(update, norm) and not needs_gradients(*tensors)
        operator = torch.ops.fastgen.adaln_visible if visible else torch.ops.fastgen.adaln
    summed, normed = operator(*tensors, *options)
    if update is None:
        summed = hidden
    return summed, summed if norm == "none" else normed


def _whole(update: Tensor | None, norm: str) -> bool:
    """Whether there is a sum and a norm of it: of one alone, compilers make a kernel of their own."""
    return update is not None and norm != "none"


def can_use_triton(hidden: Tensor, **others: Tensor | None) -> bool:
    """Whether the kernel takes these tensors of `adaln`, wherever they are."""
    return _why_not(hidden, *others.values()) is None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / RMS(x) * weight over the last axis, statistics in float32, rounded as diffusers' `RMSNorm` does."""
    dtype = x.dtype
    wide = x if dtype == torch.float64 else x.float()
    x = x * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return x.to(dtype)
    return (x.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else x) * weight


def adaln_reference(
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
) -> tuple[Tensor, Tensor]:
    """The specification."""

    def rows(conditioning: Tensor) -> Tensor:
        if sequence_ids is not None:
            return conditioning.index_select(0, sequence_ids)
        return conditioning.unsqueeze(1) if hidden.ndim == 3 else conditioning

    if update is not None:
        if update_norm:
            update = rms_norm(update, update_weight, update_eps)
        if gate is None:
            hidden = hidden + update
        else:
            hidden = torch.addcmul(hidden, rows(gate.tanh() if tanh_gate else gate), update)
    if norm == "none":
        return hidden, hidden
    if norm == "rms":
        z = rms_norm(hidden, weight, eps)
        z = z if bias is None else z + bias
    else:
        z = _layer_norm(hidden, weight, bias, eps)
    if scale is None:
        return hidden, z if shift is None else z + rows(shift)
    factor = rows(1 + scale)
    return hidden, z * factor if shift is None else torch.addcmul(rows(shift), z, factor)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """That of torch, which takes parameters of another dtype in some combinations only."""
    dtypes = {tensor.dtype for tensor in (x, weight, bias) if tensor is not None}
    if len(dtypes) == 1:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
    weight, bias = (None if vector is None else vector.to(wide) for vector in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(x.dtype)


def _check(
    hidden: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    update_weight: Tensor | None,
    sequence_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    norm: str,
    eps: float,
    update_norm: bool,
    update_eps: float,
    tanh_gate: bool,
) -> tuple[str | None, int | None]:
    """See that the arguments fit; why the kernel does not take them, or None, and the rows of conditioning."""
    optional = {"update": update, "gate": gate, "scale": scale, "shift": shift, "weight": weight, "bias": bias}
    optional |= {"update_weight": update_weight, "sequence_ids": sequence_ids, "cu_seqlens": cu_seqlens}
    check_tensors({"hidden": hidden}, optional)
    if norm not in NORMS:
        raise ValueError(f"norm: {norm!r} is unknown; choose one of {', '.join(NORMS)}")
    for name, number in (("eps", eps), ("update_eps", update_eps)):
        check_number(name, number, minimum=0)
    for name, flag in (("update_norm", update_norm), ("tanh_gate", tanh_gate)):
        check_flag(name, flag)
    if update is None and gate is not None:
        raise ValueError("gate: is of no use without update")
    if hidden.ndim not in (2, 3) or not hidden.is_floating_point():
        raise ValueError(f"hidden: needs floats [n, L, D] or [T, D], got {shown(hidden)}")
    width, samples = hidden.shape[-1], hidden.shape[0] if hidden.ndim == 3 else None
    if update is not None and (update.shape != hidden.shape or not update.is_floating_point()):
        raise ValueError(f"update: needs floats {tuple(hidden.shape)}, got {shown(update)}")
    count: int | None = None
    for name, x in (("gate", gate), ("scale", scale), ("shift", shift)):
        if x is None:
            continue
        if x.ndim != 2 or x.shape[1] != width or not x.is_floating_point():
            raise ValueError(f"{name}: needs floats [n, {width}], got {shown(x)}")
        # Sizes may be symbols of a compiler: comparisons, no sets.
        if sequence_ids is None and x.shape[0] != 1 and x.shape[0] != samples:
            raise ValueError(f"{name}: needs {samples or 1} rows, got {tuple(x.shape)}")
        if count is None or count == 1:
            count = x.shape[0]
        elif sequence_ids is not None and x.shape[0] != 1 and x.shape[0] != count:
            raise ValueError(f"gate, scale, shift: need one number of sequences, or 1; got {count} and {x.shape[0]}")
    for name, x in (("weight", weight), ("bias", bias), ("update_weight", update_weight)):
        if x is not None and (x.shape != (width,) or not x.is_floating_point()):
            raise ValueError(f"{name}: needs floats [{width}], got {shown(x)}")
    if update_weight is not None and not update_norm:
        raise ValueError("update_weight: is of no use without update_norm")
    if sequence_ids is not None:
        if hidden.ndim != 2 or sequence_ids.shape != hidden.shape[:1]:
            raise ValueError(
                f"sequence_ids: needs one number for each row of a packed [T, D]; got {tuple(sequence_ids.shape)} for "
                f"{tuple(hidden.shape)}"
            )
        if sequence_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"sequence_ids: needs int32 or int64, got {sequence_ids.dtype}")
    if cu_seqlens is not None:
        kind, shape = cu_seqlens.dtype, tuple(cu_seqlens.shape)
        if sequence_ids is None:
            raise ValueError("cu_seqlens: is of no use without sequence_ids")
        fits = len(shape) == 1 and (shape[0] >= 2 if count is None or count == 1 else shape[0] == count + 1)
        if not fits or kind not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens: needs int32 or int64 [n + 1], got {kind} {shape}")
    return _why_not(hidden, update, gate, scale, shift, weight, bias, update_weight), count


def _look(sequence_ids: Tensor, cu_seqlens: Tensor | None, tokens: int, count: int | None) -> None:
    """See that the numbers in index tensors fit, where looking is cheap."""
    if cu_seqlens is not None:
        count = cu_seqlens.shape[0] - 1
    elif count == 1:  # for all sequences, however many they are
        count = None
    check_range("sequence_ids", sequence_ids, 2**31 if count is None else count)
    if cu_seqlens is None:
        return
    check_cu_seqlens("cu_seqlens", cu_seqlens, tokens)
    if looks(cu_seqlens) and looks(sequence_ids):
        numbers = torch.arange(len(cu_seqlens) - 1, dtype=sequence_ids.dtype, device=sequence_ids.device)
        if not torch.equal(numbers.repeat_interleave(cu_seqlens.diff(), output_size=tokens), sequence_ids):
            raise ValueError("cu_seqlens: contradicts sequence_ids, needs the bounds of their runs")


def _why_not(*tensors: Tensor | None) -> str | None:
    """Why the kernel does not take these tensors."""
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
