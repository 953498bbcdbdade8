"""Weights of the denoiser in 8 or 4 bits, by torchao."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from fastgen.checks import check_choice
from fastgen.errors import FastgenError, one_line
from fastgen.pipelines.accelerate.part import Part, Undo, block_layers, denoising_network

__all__ = ["Quantize"]

_KINDS = ("int8", "int8-dynamic", "fp8", "int4")


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
        check_choice("kind", self.kind, _KINDS)

    def why_not(self, pipe: Any) -> str | None:
        model = denoising_network(pipe)
        if importlib.util.find_spec("torchao") is None:
            return "torchao is not installed (python -m pip install torchao)"
        if getattr(model, "quantization_method", None) is not None:
            return "its denoiser is quantised already"
        if not block_layers(model):
            return "its denoiser has no linear layers in blocks, or their weights are not in memory"
        where = pipe._execution_device
        if self.kind == "fp8" and (where.type != "cuda" or torch.cuda.get_device_capability(where) < (8, 9)):
            return "fp8 needs a GPU of compute capability 8.9 or newer"
        return "int4 needs a GPU" if self.kind == "int4" and where.type != "cuda" else None

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
            quantize_(model, self._config(), lambda module, name: id(module) in chosen)
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

    def _config(self) -> Any:
        from torchao import quantization as torchao

        kinds = {
            "int8": "Int8WeightOnlyConfig",
            "int8-dynamic": "Int8DynamicActivationInt8WeightConfig",
            "fp8": "Float8DynamicActivationFloat8WeightConfig",
            "int4": "Int4WeightOnlyConfig",
        }
        return getattr(torchao, kinds[self.kind])()
