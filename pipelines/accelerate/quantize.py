"""Weights of the denoiser in 8 or 4 bits, by torchao."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastgen.checks import check_choice
from fastgen.errors import FastgenError, one_line
from fastgen.pipelines.accelerate.part import Part, Undo, block_layers, denoising_network
from fastgen.pipelines.quantization import BITS, torchao_config, why_not_here

__all__ = ["Quantize"]


@dataclass(frozen=True)
class Quantize(Part):
    """Weights of the denoiser's linear layers in fewer bits. The whole ones wait in main memory.

    Layers that diffusers names as sensitive (norms, embeddings of time …) stay whole.

    Args:
        kind: of the weights; "int8-dynamic" computes in 8 bits too.
    """

    name = "quantize"
    loss = "lossy"
    kind: str = "int8"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, BITS)

    def why_not(self, pipe: Any) -> str | None:
        model = denoising_network(pipe)
        if reason := why_not_here(self.kind, pipe._execution_device):
            return reason
        if getattr(model, "quantization_method", None) is not None:
            return "its denoiser is quantised already"
        if not block_layers(model):
            return "its denoiser has no linear layers in blocks, or their weights are not in memory"
        return None

    def enable(self, pipe: Any) -> Undo:
        from torchao.quantization import quantize_

        model = denoising_network(pipe)
        layers = block_layers(model)
        before = [(layer, layer.weight, set(vars(layer))) for layer in layers]
        quantized: dict[int, Any] = {}

        def undo() -> None:
            for layer, weight, names in before:
                now = layer.weight
                if now is not quantized.get(id(layer), now):
                    continue  # the user put other weights there
                weight.data = weight.data.to(now.device)
                layer.weight = weight
                for name in set(vars(layer)) - names:
                    delattr(layer, name)

        chosen = set(map(id, layers))
        try:
            quantize_(model, torchao_config(self.kind), lambda module, name: id(module) in chosen)
            for layer, weight, _ in before:
                quantized[id(layer)] = layer.weight
                if weight.device.type == "cuda":
                    weight.data = weight.data.cpu()
        except BaseException as error:
            undo()
            if isinstance(error, Exception):
                raise FastgenError(f"quantize: {self.kind} does not work here: {one_line(error)}") from error
            raise
        return undo
