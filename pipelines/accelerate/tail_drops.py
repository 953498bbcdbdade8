"""Fewer tokens, where the denoiser has dynamic chunking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastgen.checks import check_tail_drop
from fastgen.pipelines.accelerate.calls import change_calls, takes
from fastgen.pipelines.accelerate.part import Part, Undo, denoising_network

__all__ = ["TailDrops"]


@dataclass(frozen=True)
class TailDrops(Part):
    """Fewer tokens, where the denoiser has dynamic chunking.

    Args:
        tail_drop: share of the natural tokens to drop, in [0, 1).
        uncond_tail_drop: the same for the unconditional branch (Lite-CFG), at least as much.
    """

    name = "tail_drop"
    loss = "lossy"
    tail_drop: float = 0.0
    uncond_tail_drop: float = 0.5

    def __post_init__(self) -> None:
        for name, drop in self.settings.items():
            check_tail_drop(name, drop)

    def why_not(self, pipe: Any) -> str | None:
        from fastgen.models.elastic import ElasticModelMixin

        if not isinstance(denoising_network(pipe), ElasticModelMixin):
            return "its denoiser has no dynamic chunking"
        return None if takes(pipe, "uncond_tail_drop") else "use the pipeline class with dynamic chunking"

    def enable(self, pipe: Any) -> Undo:
        def drop(given: dict[str, Any]) -> None:
            if not {"tail_drop", "uncond_tail_drop", "token_budget"} & given.keys():
                given |= self.settings

        return change_calls(pipe, drop)
