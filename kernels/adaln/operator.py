"""Operators for compilers and autograd: `fastgen::adaln`, opaque, and `fastgen::adaln_visible`, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.operators import register_visible

__all__ = ["launch"]

_PARAMETERS = ("hidden", "update", "gate", "scale", "shift", "weight", "bias", "update_weight")
_TENSORS = "Tensor hidden, " + ", ".join(f"Tensor? {name}" for name in _PARAMETERS[1:])
_OPTIONS = "str norm, float eps, bool update_norm, float update_eps, bool tanh_gate"
_INDICES = "Tensor? sequence_ids, Tensor? cu_seqlens"


def _types(hidden: Tensor, update: Tensor | None, gate: Tensor | None, *rest: Tensor | None) -> list[torch.dtype]:
    """Dtypes of y and z: promoted from their inputs."""
    *others, update_weight = rest  # scale, shift, weight, bias
    first = hidden.dtype
    for x in (update, gate, update_weight) if update is not None else ():
        if x is not None and x.dtype != first:
            first = torch.promote_types(first, x.dtype)
    second = first
    for x in others:
        if x is not None and x.dtype != second:
            second = torch.promote_types(second, x.dtype)
    return [first, second]


def _outputs(update: Tensor | None, norm: str, *tensors: Any) -> tuple[Tensor, Tensor]:
    """New tensors for y and z; empty if not computed, because an operator cannot return its input."""
    hidden = tensors[0]
    kinds = _types(*tensors)
    summed = torch.empty((0,) if update is None else hidden.shape, dtype=kinds[0], device=hidden.device)
    return summed, torch.empty((0,) if norm == "none" else hidden.shape, dtype=kinds[1], device=hidden.device)


def launch(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Run the kernel on the arguments of the operator, without autograd."""
    from fastgen.kernels.adaln import triton as adaln_triton

    hidden, update, gate, scale, shift, weight, bias, update_weight, sequence_ids, _, *options = arguments
    norm = options[0]
    given = (hidden, update, gate, scale, shift, weight, bias, update_weight)
    summed, normed = _outputs(update, norm, *given)
    if hidden.ndim == 2:
        hidden, update = hidden[None], None if update is None else update[None]
    if sequence_ids is None:
        samples = hidden.shape[0]
        gate, scale, shift = (
            x if x is None or x.shape[0] == samples else x.expand(samples, -1) for x in (gate, scale, shift)
        )
    weight, bias, update_weight, sequence_ids = (
        None if x is None else x.contiguous() for x in (weight, bias, update_weight, sequence_ids)
    )
    vectors = (gate, scale, shift, weight, bias, update_weight)
    written = (None if update is None else summed, None if norm == "none" else normed)
    adaln_triton.forward(hidden, update, *vectors, sequence_ids, *written, *options)
    return summed, normed


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _outputs(arguments[1], arguments[10], *arguments[:8])


_SCHEMA = f"({_TENSORS}, {_INDICES}, {_OPTIONS}) -> (Tensor, Tensor)"
_operator = torch.library.custom_op("fastgen::adaln", launch, mutates_args=(), schema=_SCHEMA)
_operator.register_fake(_fake)
register_visible("fastgen::adaln_visible", launch, _SCHEMA).register_fake(_fake)


def _launch_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fastgen.kernels.adaln import triton as adaln_triton

    *given, samples, norm, eps, update_norm, update_eps, tanh_gate = arguments
    grad_summed, grad_normed, hidden, update, gate, scale, weight, update_weight, sequence_ids, bounds = given
    shape = hidden.shape
    order = None
    if sequence_ids is not None and bounds is None:
        ids, order = sequence_ids.sort(stable=True)
        bounds = torch.searchsorted(ids, torch.arange(samples + 1, device=ids.device, dtype=ids.dtype))
    if hidden.ndim == 2:
        hidden, update = hidden[None], None if update is None else update[None]
    if sequence_ids is None:
        gate, scale = (None if x is None else x.expand(samples, -1) for x in (gate, scale))
    grad_summed, grad_normed, weight, update_weight, bounds = (
        None if x is None else x.contiguous() for x in (grad_summed, grad_normed, weight, update_weight, bounds)
    )
    tensors = (grad_summed, grad_normed, hidden, update, gate, scale, weight, update_weight, order, bounds)
    grad_hidden, grad_update, sums = adaln_triton.backward(
        *tensors, samples, norm, eps, update_norm, update_eps, tanh_gate
    )
    return grad_hidden.view(shape), grad_update if update is None else grad_update.view(shape), sums


_backward_operator = torch.library.custom_op(
    "fastgen::adaln_backward",
    _launch_backward,
    mutates_args=(),
    schema="(Tensor? grad_summed, Tensor? grad_normed, Tensor hidden, Tensor? update, Tensor? gate, Tensor? scale, "
    f"Tensor? weight, Tensor? update_weight, {_INDICES}, int samples, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)


@_backward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, update, samples = arguments[2], arguments[3], arguments[10]
    grad_update = hidden.new_empty(0) if update is None else hidden.new_empty(hidden.shape, dtype=update.dtype)
    sums = hidden.new_empty((3, samples, hidden.shape[-1]), dtype=torch.float32)
    return hidden.new_empty(hidden.shape), grad_update, sums


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, update, *rest = inputs[:10]
    # The norm's input, which is all that backward needs of the residual stream.
    ctx.save_for_backward(hidden if update is None else output[0], update, *rest)
    ctx.hidden_type, ctx.options = hidden.dtype, inputs[10:]


def _backward(ctx: Any, grad_summed: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, update, gate, scale, shift, weight, bias, update_weight, ids, cu_seqlens = ctx.saved_tensors
    norm, tanh_gate = ctx.options[0], ctx.options[4]
    counts = [len(x) for x in (gate, scale, shift) if x is not None]
    if ids is not None:
        samples = counts[0] if counts else 1
        ids, cu_seqlens = (ids, cu_seqlens) if counts else (None, None)
    else:
        samples = hidden.shape[0] if hidden.ndim == 3 else 1
    grads = (None if update is None else grad_summed, None if norm == "none" else grad_normed)
    tensors = (hidden, update, gate, scale, weight, update_weight, ids, cu_seqlens)
    grad_hidden, grad_update, sums = torch.ops.fastgen.adaln_backward(*grads, *tensors, samples, *ctx.options)
    by_scale, by_shift, by_gate = sums.unbind(0)  # sums of dz xhat, of dz, of dy uhat over each sample's rows

    def product(sum: Tensor, factor: Tensor | None) -> Tensor:
        return sum if factor is None else sum * factor.float()

    found: dict[str, Tensor] = {"hidden": grad_hidden.to(ctx.hidden_type)}
    if update is not None:
        found["update"] = grad_update
        opened = None if gate is None else gate.float().tanh() if tanh_gate else gate.float()
        through = product(by_gate, update_weight)
        found["gate"] = through if opened is None or not tanh_gate else through * (1 - opened.square())
        found["update_weight"] = product(by_gate, opened)
    if norm != "none":
        factor = None if scale is None else 1 + scale.float()
        normed = product(by_scale, weight)
        found["scale"] = normed if bias is None else normed + product(by_shift, bias)
        found["shift"] = by_shift
        found["weight"], found["bias"] = product(by_scale, factor), product(by_shift, factor)
    results: list[Tensor | None] = []
    given = (hidden, update, gate, scale, shift, weight, bias, update_weight)
    for index, (name, parameter) in enumerate(zip(_PARAMETERS, given, strict=True)):
        wanted = ctx.needs_input_grad[index] and name in found
        results.append(_fit(found[name], parameter) if wanted and index > 1 else found[name] if wanted else None)
    return *results, *(None,) * 7


def _fit(grad: Tensor, parameter: Tensor) -> Tensor:
    """Sum a gradient [samples, D] over the samples that shared a parameter [samples, D], [1, D] or [D]."""
    if parameter.ndim == 1:
        grad = grad.sum(0)
    elif parameter.shape[0] != grad.shape[0]:
        grad = grad.sum(0, keepdim=True)
    return grad.to(parameter.dtype)


_operator.register_autograd(_backward, setup_context=_setup_context)
