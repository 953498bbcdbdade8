"""Gated residual, norm and modulation in one pass (adaptive layer norm of DiT, arXiv 2212.09748, and of Z-Image).

    y = hidden + g(gate) * u(update)            g: identity or tanh; u: identity or a weighted RMS norm
    z = norm(y) * weight + bias, times (1 + scale), plus shift

Every part is optional. DiT, FLUX, SD3 and Qwen-Image use a layer norm without weights and plain gates; Z-Image
weighted RMS norms on both sides ("sandwich"), tanh gates and no shift. Loss contract: exact, up to rounding; the
kernel computes in float32 and rounds y and z once. On CUDA it replaces the separate kernels of eager PyTorch, and
needs no new binary when token counts change.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.kernels.dispatch import choose, direct

__all__ = ["adaln", "adaln_reference", "can_use_triton", "rms_norm"]

NORMS = ("layer", "rms", "none")
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
        gate, scale, shift: [n, D] (or [1, D] for all samples), any row stride, as `chunk` leaves them.
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
        ValueError: shapes or dtypes that do not fit, naming the argument.
    """
    _check(hidden, update, gate, scale, shift, weight, bias, norm, update_weight, sequence_ids, cu_seqlens)
    options = (norm, eps, update_norm, update_eps, tanh_gate)
    tensors = (hidden, update, gate, scale, shift, weight, bias, update_weight, sequence_ids, cu_seqlens)
    given = [x for x in tensors if x is not None]
    if not choose("adaln", _why_not(hidden, update, gate, scale, shift, weight, bias, update_weight), True, *given):
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
    operator = _launch if direct(*tensors) else torch.ops.fastgen.adaln
    summed, normed = operator(*tensors, *options)
    if update is None:
        summed = hidden
    return summed, summed if norm == "none" else normed


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
        return conditioning[:, None] if hidden.ndim == 3 else conditioning

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
        z = F.layer_norm(hidden, hidden.shape[-1:], weight, bias, eps)
    if scale is None:
        return hidden, z if shift is None else z + rows(shift)
    factor = rows(1 + scale)
    return hidden, z * factor if shift is None else torch.addcmul(rows(shift), z, factor)


def _check(
    hidden: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    update_weight: Tensor | None,
    sequence_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm: {norm!r} is unknown; choose one of {', '.join(NORMS)}")
    if hidden.ndim not in (2, 3) or not hidden.is_floating_point():
        raise ValueError(f"hidden: needs floats [n, L, D] or [T, D], got {hidden.dtype} {tuple(hidden.shape)}")
    width, samples = hidden.shape[-1], hidden.shape[0] if hidden.ndim == 3 else None
    if update is not None and (update.shape != hidden.shape or not update.is_floating_point()):
        raise ValueError(f"update: needs floats {tuple(hidden.shape)}, got {update.dtype} {tuple(update.shape)}")
    counts = set()
    for name, x in (("gate", gate), ("scale", scale), ("shift", shift)):
        if x is None:
            continue
        if x.ndim != 2 or x.shape[1] != width or not x.is_floating_point():
            raise ValueError(f"{name}: needs floats [n, {width}], got {x.dtype} {tuple(x.shape)}")
        if sequence_ids is None and x.shape[0] not in (1, samples):
            raise ValueError(f"{name}: needs {samples or 1} rows, got {tuple(x.shape)}")
        counts.add(x.shape[0])
    if sequence_ids is not None and len(counts) > 1:
        raise ValueError(f"gate, scale, shift: need one number of sequences, got {sorted(counts)}")
    for name, x in (("weight", weight), ("bias", bias), ("update_weight", update_weight)):
        if x is not None and (x.shape != (width,) or not x.is_floating_point()):
            raise ValueError(f"{name}: needs floats [{width}], got {x.dtype} {tuple(x.shape)}")
    if sequence_ids is not None:
        if hidden.ndim != 2 or sequence_ids.shape != hidden.shape[:1]:
            raise ValueError(
                f"sequence_ids: needs one number for each row of a packed [T, D]; got {tuple(sequence_ids.shape)} for "
                f"{tuple(hidden.shape)}"
            )
        if sequence_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"sequence_ids: needs int32 or int64, got {sequence_ids.dtype}")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"cu_seqlens: needs int32 or int64 [n + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")


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


def _types(
    hidden: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    update_weight: Tensor | None,
) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of y and z."""
    first = hidden.dtype
    for x in (update, gate, update_weight) if update is not None else ():
        first = first if x is None else torch.promote_types(first, x.dtype)
    second = first
    for x in (scale, shift, weight, bias):
        second = second if x is None else torch.promote_types(second, x.dtype)
    return first, second


def _launch(
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
) -> tuple[Tensor, Tensor]:
    from fastgen.kernels import adaln_triton

    first, second = _types(hidden, update, gate, scale, shift, weight, bias, update_weight)
    empty = {"device": hidden.device}
    summed = torch.empty((0,) if update is None else hidden.shape, dtype=first, **empty)
    normed = torch.empty((0,) if norm == "none" else hidden.shape, dtype=second, **empty)
    hidden = hidden if hidden.ndim == 3 else hidden[None]
    samples = hidden.shape[0]
    if sequence_ids is None:
        gate, scale, shift = (None if x is None else x.expand(samples, -1) for x in (gate, scale, shift))
    else:
        sequence_ids = sequence_ids.contiguous()
    adaln_triton.forward(
        hidden,
        None if update is None else update.view_as(hidden) if update.ndim == 3 else update[None],
        gate,
        scale,
        shift,
        *(None if x is None else x.contiguous() for x in (weight, bias, update_weight)),
        sequence_ids,
        summed,
        normed,
        norm,
        eps,
        update_norm,
        update_eps,
        tanh_gate,
    )
    return summed, normed


_operator = torch.library.custom_op("fastgen::adaln", _launch, mutates_args=())


@_operator.register_fake
def _(
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
) -> tuple[Tensor, Tensor]:
    first, second = _types(hidden, update, gate, scale, shift, weight, bias, update_weight)
    summed = hidden.new_empty((0,) if update is None else hidden.shape, dtype=first)
    return summed, hidden.new_empty((0,) if norm == "none" else hidden.shape, dtype=second)


@torch.library.custom_op("fastgen::adaln_backward", mutates_args=())
def _backward_operator(
    grad_summed: Tensor | None,
    grad_normed: Tensor | None,
    hidden: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    update_weight: Tensor | None,
    sequence_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    samples: int,
    norm: str,
    eps: float,
    update_norm: bool,
    update_eps: float,
    tanh_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from fastgen.kernels import adaln_triton

    shape = hidden.shape
    order, bounds = None, cu_seqlens
    if sequence_ids is not None and cu_seqlens is None:
        ids, order = sequence_ids.sort(stable=True)
        bounds = torch.searchsorted(ids, torch.arange(samples + 1, device=ids.device, dtype=ids.dtype))
    if hidden.ndim == 2:
        hidden = hidden[None]
        update = None if update is None else update[None]
    if sequence_ids is None:
        gate, scale = (None if x is None else x.expand(samples, -1) for x in (gate, scale))
    grad_hidden, grad_update, sums = adaln_triton.backward(
        None if grad_summed is None else grad_summed.contiguous(),
        None if grad_normed is None else grad_normed.contiguous(),
        hidden,
        update,
        gate,
        scale,
        *(None if x is None else x.contiguous() for x in (weight, update_weight)),
        order,
        bounds,
        samples,
        norm,
        eps,
        update_norm,
        update_eps,
        tanh_gate,
    )
    return grad_hidden.view(shape), grad_update if update is None else grad_update.view(shape), sums


@_backward_operator.register_fake
def _(
    grad_summed: Tensor | None,
    grad_normed: Tensor | None,
    hidden: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    update_weight: Tensor | None,
    sequence_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    samples: int,
    norm: str,
    eps: float,
    update_norm: bool,
    update_eps: float,
    tanh_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_update = hidden.new_empty(0) if update is None else hidden.new_empty(hidden.shape, dtype=update.dtype)
    sums = hidden.new_empty((3, samples, hidden.shape[-1]), dtype=torch.float32)
    return hidden.new_empty(hidden.shape), grad_update, sums


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, update, gate, scale, shift, weight, bias, update_weight, ids, cu_seqlens, *options = inputs
    ctx.save_for_backward(
        hidden if update is None else output[0],
        update,
        gate,
        scale,
        shift,
        weight,
        bias,
        update_weight,
        ids,
        cu_seqlens,
    )
    ctx.hidden_type = hidden.dtype
    ctx.options = options


def _backward(ctx: Any, grad_summed: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, update, gate, scale, shift, weight, bias, update_weight, ids, cu_seqlens = ctx.saved_tensors
    norm, eps, update_norm, update_eps, tanh_gate = ctx.options
    conditioning = [x for x in (gate, scale, shift) if x is not None]
    if ids is not None:
        samples = conditioning[0].shape[0] if conditioning else 1
        if not conditioning:
            ids = cu_seqlens = None
    else:
        samples = hidden.shape[0] if hidden.ndim == 3 else 1
    grad_hidden, grad_update, sums = torch.ops.fastgen.adaln_backward(
        None if update is None else grad_summed,
        None if norm == "none" else grad_normed,
        hidden,
        update,
        gate,
        scale,
        weight,
        update_weight,
        ids,
        cu_seqlens,
        samples,
        *ctx.options,
    )
    by_scale, by_shift, by_gate = sums.unbind(0)
    wanted = dict(zip(_PARAMETERS, ctx.needs_input_grad, strict=False))
    grads: dict[str, Tensor] = {"hidden": grad_hidden.to(ctx.hidden_type)}
    if update is not None:
        grads["update"] = grad_update
        opened = None if gate is None else (gate.float().tanh() if tanh_gate else gate.float())
        if wanted["gate"]:
            by_gate_ = by_gate if update_weight is None else by_gate * update_weight.float()
            grads["gate"] = _fit(by_gate_ * (1 - opened.square()) if tanh_gate else by_gate_, gate)
        if wanted["update_weight"]:
            grads["update_weight"] = _fit(by_gate if opened is None else by_gate * opened, update_weight)
    if norm != "none":
        factor = None if scale is None else 1 + scale.float()
        if wanted["scale"]:
            normed = by_scale if weight is None else by_scale * weight.float()
            grads["scale"] = _fit(normed if bias is None else normed + by_shift * bias.float(), scale)
        if wanted["shift"]:
            grads["shift"] = _fit(by_shift, shift)
        if wanted["weight"]:
            grads["weight"] = _fit(by_scale if factor is None else by_scale * factor, weight)
        if wanted["bias"]:
            grads["bias"] = _fit(by_shift if factor is None else by_shift * factor, bias)
    return *(grads.get(name) if wanted[name] else None for name in _PARAMETERS), *(None,) * 7


_PARAMETERS = ("hidden", "update", "gate", "scale", "shift", "weight", "bias", "update_weight")


def _fit(grad: Tensor, parameter: Tensor) -> Tensor:
    """Sum a gradient [samples, D] over the samples that shared a parameter [samples, D], [1, D] or [D]."""
    if parameter.ndim == 1:
        grad = grad.sum(0)
    elif parameter.shape[0] != grad.shape[0]:
        grad = grad.sum(0, keepdim=True)
    return grad.to(parameter.dtype)


_operator.register_autograd(_backward, setup_context=_setup_context)
