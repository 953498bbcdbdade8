"""Counts the floating-point operations of the tensor operations that really run. Imports torch; a leaf otherwise.

Two counters share the work:

* `FlopCounter` sees calls at the torch-function level: ``F.linear``, ``@`` and the matmul family, convolutions,
  ``scaled_dot_product_attention`` and operators under ``torch.ops``. It reads shapes only. Every
  torch call, counted or not, costs about 2 microseconds (measured on one CPU core); a step of the embedded
  diffusion transformer makes about 1,000 of them.
* `_AtenCounter` sees the operations below the few composites (``einsum``, ``multi_head_attention_forward`` ...) whose
  cost depends on how they are carried out. It is entered only around those.

A multiply-add is 2 FLOPs; a bias, an activation, a norm and a soft-max count as 0, as is usual for models. Causal
attention is not halved. Recurrent operators (``lstm``), ``flex_attention``, what a scripted or compiled graph runs and
the backward pass are not seen. A custom operator is counted when it has a formula in
`torch.utils.flop_counter.register_flop_formula`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
#: Called with the kind of operation ("linear", "matmul", "conv", "attention" or an operator's name) and its FLOPs.
Report = Callable[[str, int], None]
Formula = Callable[[Args, Kwargs, Any], int]


def _argument(args: Args, kwargs: Kwargs, index: int, name: str) -> Any:
    return args[index] if len(args) > index else kwargs[name]


def _product(index: int, name: str) -> Formula:
    """Matrix product: every element of the result is a dot product along the last axis of the named argument."""

    def formula(args: Args, kwargs: Kwargs, out: Any) -> int:
        return 2 * out.numel() * _argument(args, kwargs, index, name).shape[-1]

    return formula


def _batch_summed_product(args: Args, kwargs: Kwargs, out: Any) -> int:
    """``addbmm``: batch1 [B, N, K] times batch2 [B, K, M], summed over B into [N, M]."""
    return 2 * _argument(args, kwargs, 1, "batch1").numel() * out.shape[-1]


def _conv(args: Args, kwargs: Kwargs, out: Any) -> int:
    weight = _argument(args, kwargs, 1, "weight")  # [out, in / groups, *kernel]
    return 2 * out.numel() * weight.shape[1:].numel()


def _conv_transpose(args: Args, kwargs: Kwargs, out: Any) -> int:
    weight = _argument(args, kwargs, 1, "weight")  # [in, out / groups, *kernel]
    return 2 * _argument(args, kwargs, 0, "input").numel() * weight.shape[1:].numel()


def _attention(args: Args, kwargs: Kwargs, out: Any) -> int:
    """Query [..., Lq, D], key [..., Lk, D], value [..., Lk, Dv] -> out [..., Lq, Dv]; heads are those of the query."""
    query, key = _argument(args, kwargs, 0, "query"), _argument(args, kwargs, 1, "key")
    return 2 * out.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + out.shape[-1])


def _formulas() -> dict[Any, tuple[str, Formula]]:
    table: dict[Any, tuple[str, Formula]] = {
        F.linear: ("linear", _product(0, "input")),
        F.scaled_dot_product_attention: ("attention", _attention),
        torch.addbmm: ("matmul", _batch_summed_product),
        torch.Tensor.addbmm: ("matmul", _batch_summed_product),
        torch.Tensor.addbmm_: ("matmul", _batch_summed_product),
        torch.linalg.matmul: ("matmul", _product(0, "input")),
        torch.Tensor.__rmatmul__: ("matmul", _product(1, "other")),  # other @ self
    }
    for name in ("matmul", "mm", "bmm", "mv", "dot", "vdot"):
        table[getattr(torch, name)] = table[getattr(torch.Tensor, name)] = ("matmul", _product(0, "input"))
    for name, factor in (("addmm", "mat1"), ("baddbmm", "batch1"), ("addmv", "mat")):
        for function in (getattr(torch, name), getattr(torch.Tensor, name), getattr(torch.Tensor, f"{name}_")):
            table[function] = ("matmul", _product(1, factor))
    for dims in (1, 2, 3):
        # torch.conv2d and F.conv2d are two names of one function in some releases and two functions in others.
        for module in (F, torch):
            table[getattr(module, f"conv{dims}d")] = ("conv", _conv)
            table[getattr(module, f"conv_transpose{dims}d")] = ("conv", _conv_transpose)
    return table


_FORMULAS = _formulas()
_COMPOSITES = frozenset(
    {
        torch.einsum,
        torch.tensordot,
        torch.chain_matmul,
        torch.inner,
        torch.Tensor.inner,
        torch.linalg.multi_dot,
        F.bilinear,
        F.multi_head_attention_forward,
        torch._native_multi_head_attention,
        torch._transformer_encoder_layer_fwd,
    }
)


def _kind(packet: OpOverloadPacket) -> str:
    name = packet.__name__
    if "attention" in name:
        return "attention"
    return "conv" if "conv" in name else "matmul" if "mm" in name else name


class _AtenCounter(TorchDispatchMode):
    """Counts the registered operators below one composite call."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def __torch_dispatch__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            # In inference mode a composite operator arrives whole and its parts would run unseen.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        out = func(*args, **kwargs)
        if formula is not None:
            self._report(_kind(func._overloadpacket), int(formula(*args, **kwargs, out_val=out)))
        return out


class FlopCounter(TorchFunctionMode):
    """Reports the FLOPs of every operation called in this thread while the mode is active."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        kwargs = kwargs or {}
        known = _FORMULAS.get(func)
        if known is not None:
            out = func(*args, **kwargs)
            self._report(known[0], known[1](args, kwargs, out))
            return out
        if func in _COMPOSITES or isinstance(func, (OpOverload, OpOverloadPacket)):
            with _AtenCounter(self._report):
                return func(*args, **kwargs)
        return func(*args, **kwargs)
