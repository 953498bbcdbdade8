"""Triton launchers as operators of PyTorch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.dispatch import direct, has_triton, interpreted

__all__ = ["register_launcher", "register_visible"]


def register_launcher(
    schema: str, launcher: str, fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """Register a launcher as an operator, opaque to compilers.

    Args:
        schema: name and arguments of the operator, "scatter(Tensor packed, Tensor mask) -> Tensor".
        launcher: where the function is, "fastgen.kernels.pack.triton:launch_scatter". Triton is optional, so its
            module is imported by the first call.
        fake: results without memory, for compilers.
        mutates: names of the arguments that are written to.

    Returns:
        a function that starts the launcher, through the operator only where a compiler, autograd or a subclass of
        tensors needs it: that costs more.
    """
    name, arguments = schema.split("(", 1)
    module, function = launcher.split(":")

    def launch(*arguments: Any) -> Any:
        return getattr(import_module(module), function)(*arguments)

    operator = torch.library.custom_op(f"fastgen::{name}", launch, mutates_args=mutates, schema=f"({arguments}")
    operator.register_fake(fake)
    registered = getattr(torch.ops.fastgen, name)

    def start(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not direct(*[x for x in arguments if isinstance(x, Tensor)]):
            return registered(*arguments)
        return launch(*arguments)

    return start


def register_visible(name: str, function: Callable[..., Any], schema: str) -> Any:
    """An operator of PyTorch, for inference, whose kernels compilers see and start themselves: calls of an opaque one
    cost the host as much as small kernels take. Where Triton's interpreter runs kernels, compilers cannot see them.

    Arguments: see `torch.library.custom_op`.
    """
    if not has_triton() or interpreted():
        return torch.library.custom_op(name, function, mutates_args=(), schema=schema)
    function.__signature__ = _signature(schema)  # type: ignore[attr-defined]  # of which it makes a schema itself
    return torch.library.triton_op(name, function, mutates_args=())


_TYPES: dict[str, Any] = {
    "Tensor": Tensor,
    "Tensor?": Tensor | None,
    "int[]": Sequence[int],
    "str": str,
    "float": float,
    "bool": bool,
}


def _signature(schema: str) -> inspect.Signature:
    """Of a function with the arguments of a schema, which gives a tuple of tensors."""
    arguments, results = schema.split(" -> ")
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=_TYPES[kind])
        for kind, name in (argument.split() for argument in arguments.strip("()").split(", "))
    ]
    tensors = (Tensor,) * results.count("Tensor")
    return inspect.Signature(parameters, return_annotation=tuple[tensors])  # type: ignore[valid-type]
