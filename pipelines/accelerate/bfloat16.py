"""Linear layers of the denoiser in bfloat16, where the processor multiplies it natively."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastgen.environment import native_bfloat16
from fastgen.pipelines.accelerate.part import Part, Undo, block_layers, denoising_network

__all__ = ["BFloat16"]


@dataclass(frozen=True)
class BFloat16(Part):
    """Linear layers of a float32 denoiser's blocks multiply in bfloat16; all else stays float32.

    Layers that diffusers names as sensitive (norms, embeddings of time …) stay as they are.
    """

    name = "bfloat16"
    loss = "lossy"

    def why_not(self, pipe: Any) -> str | None:
        model, where = denoising_network(pipe), torch.device(pipe._execution_device)
        layers = block_layers(model)
        if not layers or any(layer.weight.dtype != torch.float32 for layer in layers):
            return "its denoiser has no linear layers in float32 in its blocks, or their weights are not in memory"
        if any(layer.weight.device.type != where.type for layer in layers):
            return "the weights of its denoiser wait elsewhere"
        if any(module._compiled_call_impl is not None for module in model.modules()):
            return "its denoiser is compiled already"
        return None if native_bfloat16(where) else "the processor does not multiply bfloat16 natively"

    def enable(self, pipe: Any) -> Undo:
        before: list[tuple[nn.Linear, str, Any, Any]] = []
        hooks: list[Any] = []

        def undo() -> None:
            for hook in hooks:
                hook.remove()
            for layer, name, whole, half in before:
                if getattr(layer, name) is half:  # not one that the user put there meanwhile
                    whole.data = whole.data.to(half.device)
                    setattr(layer, name, whole)

        try:
            for layer in block_layers(denoising_network(pipe)):
                for name in ("weight", "bias"):
                    if (whole := getattr(layer, name)) is not None:
                        half = nn.Parameter(whole.data.bfloat16(), requires_grad=False)
                        before.append((layer, name, whole, half))
                        setattr(layer, name, half)
                hooks.append(layer.register_forward_pre_hook(_narrow))
                hooks.append(layer.register_forward_hook(_widen, prepend=True))
        except BaseException:
            undo()
            raise
        return undo


def _narrow(layer: Any, args: tuple[Any, ...]) -> Any:
    # A layer that got other weights meanwhile computes in their type.
    return (args[0].to(layer.weight.dtype), *args[1:])


def _widen(layer: Any, args: Any, output: Any) -> Any:
    return output.float()
