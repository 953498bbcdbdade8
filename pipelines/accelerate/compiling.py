"""Regional compilation as a part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastgen.pipelines.accelerate.part import Part, Undo, denoising_network

__all__ = ["Compile"]


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
