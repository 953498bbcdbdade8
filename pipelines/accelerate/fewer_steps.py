"""Fewer steps of the same scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastgen.checks import check_number
from fastgen.pipelines.accelerate.calls import change_calls, takes
from fastgen.pipelines.accelerate.part import Part, Undo
from fastgen.pipelines.stock_arguments import defaults_of

__all__ = ["FewerSteps"]


@dataclass(frozen=True)
class FewerSteps(Part):
    """Fewer points of the same scheduler.

    Args:
        share: of the steps that are asked for, in (0, 1).
    """

    name = "fewer_steps"
    loss = "lossy"
    share: float = 0.5

    def __post_init__(self) -> None:
        check_number("share", self.share, above=0, below=1)

    def why_not(self, pipe: Any) -> str | None:
        return None if takes(pipe, "num_inference_steps") else "its call takes no number of steps"

    def enable(self, pipe: Any) -> Undo:
        default = defaults_of(type(pipe))["num_inference_steps"]

        def fewer(given: dict[str, Any]) -> None:
            steps = given.get("num_inference_steps", default)
            if isinstance(steps, int) and not isinstance(steps, bool) and steps > 0:
                given["num_inference_steps"] = max(1, round(self.share * steps))

        return change_calls(pipe, fewer)
