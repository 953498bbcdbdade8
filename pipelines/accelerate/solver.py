"""A solver of higher order, which needs fewer steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastgen.checks import check_number
from fastgen.pipelines.accelerate.part import Part, Undo

__all__ = ["Solver"]

# Settings of the Euler scheduler that UniPC does not read.
_UNREAD = (
    *("stochastic_sampling", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    "invert_sigmas",
)
# Pipelines that ask of their scheduler what UniPC has not: times with their levels, or Euler's own settings.
_OTHERS = ("BriaFiboPipeline", "CogView4Pipeline", "CogView4ControlPipeline", "GlmImagePipeline")


@dataclass(frozen=True)
class Solver(Part):
    """UniPC in place of the Euler steps of a flow model. It is not faster alone, but needs fewer steps: use
    it with `fewer_steps`.

    Args:
        shift: what the shift of the noise levels is multiplied by; above 1, more of the steps are at high noise, which
            is where few steps lose most.
    """

    name = "solver"
    loss = "lossy"
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_number("shift", self.shift, above=0)

    def why_not(self, pipe: Any) -> str | None:
        scheduler: Any = getattr(pipe, "scheduler", None)
        if type(scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
            return "its scheduler does not take the Euler steps of a flow model"
        if type(pipe).__name__ in _OTHERS:
            return "its call needs the Euler scheduler of flow models"
        other = next((name for name in _UNREAD if scheduler.config.get(name)), None)
        if scheduler.config.get("time_shift_type", "exponential") != "exponential":
            other = "time_shift_type"
        return None if other is None else f"its scheduler has {other}"

    def enable(self, pipe: Any) -> Undo:
        from fastgen.pipelines.flow_solver import unipc_of_flow

        stock, config = pipe.scheduler, pipe.config
        pipe.scheduler = made = unipc_of_flow(stock, self.shift)

        def undo() -> None:
            if pipe.scheduler is made:  # not one that the user put there meanwhile
                pipe.scheduler = stock
                if dict(pipe.config) == dict(config):  # a pipeline makes another one with every component
                    pipe._internal_dict = config

        return undo
