"""Parts that change no picture beyond rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastgen.pipelines.accelerate.part import Part, Undo, denoising_network

__all__ = ["ChannelsLast", "Compile", "Kernels"]


@dataclass(frozen=True)
class Kernels(Part):
    """Fused kernels, `fastgen.enable_kernels`."""

    name = "kernels"
    loss = "exact"

    def why_not(self, pipe: Any) -> str | None:
        from fastgen.pipelines.kernels import served

        enabled, others = served(pipe)
        if enabled:
            return "enabled already"
        if not others:
            return "nothing in it is served"
        return None if pipe.device.type == "cuda" else "Triton kernels need a GPU"

    def enable(self, pipe: Any) -> Undo:
        from fastgen.pipelines.kernels import disable_kernels, enable_kernels

        enable_kernels(pipe)
        return lambda: disable_kernels(pipe)


@dataclass(frozen=True)
class ChannelsLast(Part):
    """Weights of convolutions with the channels innermost, as their fastest routines read them."""

    name = "channels_last"
    loss = "exact"

    def why_not(self, pipe: Any) -> str | None:
        if not self._convolutions(pipe):
            return "no 2D convolutions, or their weights are not on a device, or quantised"
        return None

    def enable(self, pipe: Any) -> Undo:
        before = [(layer, layer.weight.data) for layer in self._convolutions(pipe)]

        def undo() -> None:
            for layer, weight in before:
                # Weights that were moved or replaced meanwhile are no longer those of before.
                same = layer.weight.shape == weight.shape and layer.weight.device == weight.device
                if same and layer.weight.dtype == weight.dtype and torch.equal(layer.weight.data, weight):
                    layer.weight.data = weight
                else:
                    layer.weight.data = layer.weight.data.contiguous()

        for layer, weight in before:
            layer.weight.data = weight.contiguous(memory_format=torch.channels_last)
        return undo

    def _convolutions(self, pipe: Any) -> list[Any]:
        parts = [getattr(pipe, name, None) for name in ("unet", "vae", "movq", "vqvae", "controlnet")]
        return [
            layer
            for part in parts
            if isinstance(part, nn.Module)
            for layer in part.modules()
            if type(layer) is nn.Conv2d
            and layer.weight.is_floating_point()
            and layer.weight.device.type != "meta"
            and layer.kernel_size != (1, 1)
            and layer.weight.is_contiguous()
        ]


@dataclass(frozen=True)
class Compile(Part):
    """Regional compilation: `compile_repeated_blocks` of the denoiser. The first call of a size takes long."""

    name = "compile"
    loss = "exact"

    def why_not(self, pipe: Any) -> str | None:
        model = denoising_network(pipe)
        if model is None or not getattr(model, "_repeated_blocks", None):
            return "its denoiser names no repeated blocks"
        if any(module._compiled_call_impl is not None for module in model.modules()):
            return "compiled already"
        return None

    def enable(self, pipe: Any) -> Undo:
        model = denoising_network(pipe)
        model.compile_repeated_blocks()
        compiled = [module for module in model.modules() if module._compiled_call_impl is not None]

        def undo() -> None:
            for module in compiled:
                vars(module).pop("_compiled_call_impl", None)  # the class has it: None

        return undo
