"""Fused kernels as a part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastgen.pipelines.accelerate.part import Part, Undo

__all__ = ["Kernels"]


@dataclass(frozen=True)
class Kernels(Part):
    """Fused kernels, `fastgen.enable_kernels`."""

    name = "kernels"
    loss = "exact"

    def why_not(self, pipe: Any) -> str | None:
        if pipe.device.type != "cuda":  # first: what follows imports networks of transformers
            return "Triton kernels need a GPU"
        from fastgen.pipelines.kernels import served

        enabled, others = served(pipe)
        if enabled:
            return "enabled already"
        return None if others else "nothing in it is served"

    def enable(self, pipe: Any) -> Undo:
        from fastgen.pipelines.kernels import disable_kernels, enable_kernels

        enable_kernels(pipe)
        return lambda: disable_kernels(pipe)
