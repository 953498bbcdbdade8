"""Triton launchers as PyTorch operators."""

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
        launcher: path of the function, "fastgen.kernels.pack.triton:launch_scatter". Triton is optional, so the first
            call imports its module.
        fake: results without data, for compilers.
        mutates: names of the arguments that are changed in place.

    Returns:
        a function that calls the launcher; through the slower operator only if a compiler, autograd or a tensor
        subclass needs it.
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
    """An operator for inference whose kernels compilers see and launch themselves: calling an opaque operator takes
    the host as long as a small kernel runs. Opaque without Triton and under Triton's interpreter.

    Arguments: see `torch.library.custom_op`.
    """
    if not has_triton() or interpreted():
        return torch.library.custom_op(name, function, mutates_args=(), schema=schema)
    function.__signature__ = _signature(schema)  # type: ignore[attr-defined]  # triton_op derives the schema from it
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
    """Signature of a function with a schema's arguments that returns a tuple of tensors."""
    arguments, results = schema.split(" -> ")
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=_TYPES[kind])
        for kind, name in (argument.split() for argument in arguments.strip("()").split(", "))
    ]
    tensors = (Tensor,) * results.count("Tensor")
    return inspect.Signature(parameters, return_annotation=tuple[tensors])  # type: ignore[valid-type]
