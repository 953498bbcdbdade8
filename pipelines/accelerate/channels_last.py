"""Convolutions whose weights have the channels innermost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastgen.pipelines.accelerate.part import Part, Undo

__all__ = ["ChannelsLast"]


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
        # The first layout is not kept: a second copy of every weight would cost memory. It is written again instead.
        layers = self._convolutions(pipe)

        def undo() -> None:
            for layer in layers:
                layer.weight.data = layer.weight.data.contiguous()

        try:
            for layer in layers:
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        except BaseException:
            undo()
            raise
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
            and not layer.weight.is_contiguous(memory_format=torch.channels_last)  # one channel: nothing to gain
        ]
