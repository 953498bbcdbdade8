"""Attention over packed sequences of different lengths: each token attends within its own sequence, without padding.

On CUDA in half precision this is torch's variable-length flash attention. Otherwise sequences of equal length share
one call of `scaled_dot_product_attention`; if all have the same length, that is the dense batched call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastgen.kernels.arguments import check_int, check_tensors, shown
from fastgen.kernels.dispatch import Checked, check_cu_seqlens

_checked = Checked()
_FLASH_TYPES = (torch.float16, torch.bfloat16)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sequence (DC-DiT, section 5 of the specification of packing).

    Args:
        query, key, value: [T, heads, head_dim], the sequences one after the other.
        cu_seqlens: int32 [n + 1], start of each sequence and T.
        max_seqlen: length of the longest sequence, or more.

    Returns:
        [T, heads, head_dim].

    Raises:
        TypeError: an argument that must be a tensor is not one.
        ValueError: shapes, dtypes, devices or numbers that do not fit. Bounds are checked on a CPU, and with
            FASTGEN_KERNELS_DEBUG=1 on a GPU.
    """
    tensors = (query, key, value, cu_seqlens)
    _checked(lambda: _check(*tensors), tensors)
    check_int("max_seqlen", max_seqlen, 0)
    check_cu_seqlens(cu_seqlens, query.shape[0], max_seqlen)
    kind = query.device.type
    # Under autocast, normalised queries and keys are float32, values are not. (The meta device has no autocast.)
    if kind != "meta" and torch.is_autocast_enabled(kind):
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key, value: need one dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    if can_use_flash(query):
        from torch.nn.attention.varlen import varlen_attn

        # Returns a tuple only if more outputs are requested.
        return cast(Tensor, varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen))
    grouped: Tensor = torch.ops.fastgen.varlen_attention(query, key, value, cu_seqlens)
    return grouped


def _check(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> None:
    """Check shapes, dtypes and devices."""
    check_tensors({"query": query, "key": key, "value": value, "cu_seqlens": cu_seqlens})
    if query.ndim != 3 or query.shape != key.shape or query.shape != value.shape:
        raise ValueError(
            f"query, key, value: need equal [T, heads, head_dim], got {tuple(query.shape)}, {tuple(key.shape)}, "
            f"{tuple(value.shape)}"
        )
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not x.is_floating_point():
            raise ValueError(f"{name}: needs floats [T, heads, head_dim], got {shown(x)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: needs int32 [n + 1], got {shown(cu_seqlens)}")


def can_use_flash(query: Tensor) -> bool:
    """Whether torch's variable-length flash attention supports this query."""
    return query.is_cuda and query.dtype in _FLASH_TYPES and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0


def varlen_attention_reference(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The reference: one sequence at a time."""
    bounds = cu_seqlens.tolist()
    outputs = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


@torch.library.custom_op("fastgen::varlen_attention", mutates_args=())
def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
    return _by_length(_dense, (query, key, value), cu_seqlens.tolist())[0]


@_varlen_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("fastgen::varlen_attention_backward", mutates_args=())
def _varlen_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # Autograd does not see into an operator, hence the formula: with P = softmax(S), dS = P (dP - sum(dP P)).
    scale = query.shape[-1] ** -0.5

    def gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v = (x.transpose(1, 2) for x in (grad, q, k, v))
        weights = (q @ k.transpose(2, 3)).mul_(scale).softmax(dim=-1)
        inner = grad @ v.transpose(2, 3)
        inner = weights * (inner - (inner * weights).sum(dim=-1, keepdim=True))
        results = (inner @ k * scale, inner.transpose(2, 3) @ q * scale, weights.transpose(2, 3) @ grad)
        return results[0].transpose(1, 2), results[1].transpose(1, 2), results[2].transpose(1, 2)

    grads = _by_length(gradients, (grad, query, key, value), cu_seqlens.tolist())
    return grads[0], grads[1], grads[2]


@_varlen_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return *torch.ops.fastgen.varlen_attention_backward(grad, *ctx.saved_tensors), None


_varlen_attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastgen.varlen_attention, get_raw=True)
def _flops(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *args, out_val=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    lengths = cu_seqlens.diff().tolist()
    return 4 * query.shape[1] * query.shape[2] * sum(length * length for length in lengths)


def _by_length(
    work: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], bounds: list[int]
) -> tuple[Tensor, ...]:
    """Call `work` on [n, L, heads, d] for all sequences of equal length; the results are packed like the inputs."""
    lengths = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    heads, width = inputs[0].shape[1:]
    if len(set(lengths)) == 1:
        dense = work(*(x.reshape(len(lengths), lengths[0], heads, width) for x in inputs))
        return tuple(x.reshape(-1, heads, width) for x in dense)
    places: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        places.setdefault(length, []).append(index)
    pieces: list[tuple[Tensor, ...]] = [()] * len(lengths)
    for indices in places.values():
        stacked = (torch.stack([x[bounds[i] : bounds[i + 1]] for i in indices]) for x in inputs)
        for i, results in zip(indices, zip(*work(*stacked), strict=True), strict=True):
            pieces[i] = results
    return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


def _dense(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2),)
