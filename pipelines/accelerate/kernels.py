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
