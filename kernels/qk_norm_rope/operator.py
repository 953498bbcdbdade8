"""Operators for compilers and autograd: `fastgen::qk_norm_rope` and `fastgen::qk_norm_rope_` (in place), opaque, and
`fastgen::qk_norm_rope_visible`, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.operators import register_visible

__all__ = ["launch", "launch_inplace"]


def launch(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Run the kernel on the arguments of the operator, without autograd."""
    out = (_fresh(query), _fresh(key))
    _forward(query, key, out, *rest)
    return out


def launch_inplace(query: Tensor, key: Tensor, *rest: Any) -> None:
    """Run the kernel in place on query and key, without autograd."""
    _forward(query, key, (query, key), *rest)


def _forward(query: Tensor, key: Tensor, out: tuple[Tensor, Tensor], *rest: Any) -> None:
    from fastgen.kernels.qk_norm_rope import triton as qk_norm_rope_triton

    cos, sin, positions, axes, *vectors, norm, eps, interleaved = rest
    heads = (x if x.ndim == 4 else x[None] for x in (query, key, *out))
    tables = _tables(cos, sin, positions, len(axes))
    weights = (None if x is None else x.contiguous() for x in vectors)
    run: Any = qk_norm_rope_triton.forward
    run(*heads, *tables, tuple(axes), *weights, norm, eps, interleaved)


def _fresh(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _tables(
    cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, axes: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Tables [n or 1, P, d / 2] with one layout, and positions [n or 1, L, axes]."""
    if cos is not None and sin is not None:
        cos, sin = (x if x.ndim == 3 else x[None] for x in (cos, sin))
        if cos.stride() != sin.stride() or cos.dtype != sin.dtype:
            cos, sin = cos.float().contiguous(), sin.float().contiguous()
    if positions is not None:
        positions = positions if axes > 1 else positions.unsqueeze(-1)
        positions = positions if positions.ndim == 3 else positions[None]
    return cos, sin, positions


_REST = (
    "Tensor? cos, Tensor? sin, Tensor? positions, int[] axes, Tensor? query_weight, Tensor? key_weight, "
    "Tensor? query_bias, Tensor? key_bias, str norm, float eps, bool interleaved"
)
_SCHEMA = f"(Tensor query, Tensor key, {_REST}) -> (Tensor, Tensor)"
_operator = torch.library.custom_op("fastgen::qk_norm_rope", launch, mutates_args=(), schema=_SCHEMA)
_visible_operator = register_visible("fastgen::qk_norm_rope_visible", launch, _SCHEMA)


@_visible_operator.register_fake
@_operator.register_fake
def _(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


# Opaque: compilers copy the input of a visible kernel that overwrites it.
_inplace_operator = torch.library.custom_op(
    "fastgen::qk_norm_rope_",
    launch_inplace,
    mutates_args=("query", "key"),
    schema=f"(Tensor(a!) query, Tensor(b!) key, {_REST}) -> ()",
)


@_inplace_operator.register_fake
def _(*arguments: Any) -> None:
    return None


def _launch_backward(grad: Tensor, tensor: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from fastgen.kernels.qk_norm_rope.triton_backward import backward

    cos, sin, positions, axes, weight, norm, eps, interleaved = rest
    shape = tensor.shape
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    grad, tensor = (x if x.ndim == 4 else x[None] for x in (grad, tensor))
    tables = _tables(cos, sin, positions, len(axes))
    weight = None if weight is None else weight.contiguous()
    out, sums = backward(grad, tensor, *tables, tuple(axes), weight, norm, eps, interleaved)
    return out.view(shape), sums


_backward_operator = torch.library.custom_op(
    "fastgen::qk_norm_rope_backward",
    _launch_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor tensor, Tensor? cos, Tensor? sin, Tensor? positions, int[] axes, Tensor? weight, "
    "str norm, float eps, bool interleaved) -> (Tensor, Tensor)",
)


@_backward_operator.register_fake
def _(grad: Tensor, tensor: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return tensor.new_empty(tensor.shape), tensor.new_empty((2, tensor.shape[-1]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, cos, sin, positions, axes, *vectors, norm, eps, interleaved = inputs
    ctx.save_for_backward(query, key, cos, sin, positions, *vectors[:2])
    ctx.axes, ctx.options = axes, (norm, eps, interleaved)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    query, key, cos, sin, positions, *weights = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    inputs: list[Tensor | None] = []
    vectors: list[Tensor | None] = [None] * 4  # weights of query and key, then biases
    for which, (grad, tensor, weight) in enumerate(zip(grads, (query, key), weights, strict=True)):
        if not any(wanted[at] for at in (which, 6 + which, 8 + which)):
            inputs.append(None)
            continue
        rest = (cos, sin, positions, ctx.axes, weight, *ctx.options)
        turned, sums = torch.ops.fastgen.qk_norm_rope_backward(grad, tensor, *rest)
        inputs.append(turned if wanted[which] else None)
        for at, sum in zip((which, 2 + which), sums, strict=True):
            if wanted[6 + at]:
                vectors[at] = sum.to(tensor.dtype if weight is None else weight.dtype)
    return *inputs, *(None,) * 4, *vectors, *(None,) * 3


_operator.register_autograd(_backward, setup_context=_setup_context)
