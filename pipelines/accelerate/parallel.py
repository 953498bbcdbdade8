"""Context parallelism of diffusers as a part: several processes compute one picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastgen.checks import check_choice
from fastgen.pipelines.accelerate.part import Part, Undo, denoising_network, remove_empty_hooks

__all__ = ["ContextParallel"]


@dataclass(frozen=True)
class ContextParallel(Part):
    """The tokens of one picture are spread over all processes of `torch.distributed`, by `enable_parallelism`.

    Every process calls the pipeline with the same arguments and gets the same picture.

    Args:
        kind: "ulysses" exchanges attention heads, "ring" keys and values.
    """

    name = "context_parallel"
    loss = "exact"
    kind: str = "ulysses"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("ulysses", "ring"))

    def why_not(self, pipe: Any) -> str | None:
        from torch import distributed

        model = denoising_network(pipe)
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return "one process only: see torchrun"
        if getattr(model, "_cp_plan", None) is None:
            return f"diffusers has no plan for {type(model).__name__}"
        if model._parallel_config is not None:
            return "parallelism is enabled already"
        return None if torch.accelerator.device_count() else "diffusers needs a GPU for each process"

    def enable(self, pipe: Any) -> Undo:
        from diffusers import ContextParallelConfig
        from diffusers.hooks.context_parallel import remove_context_parallel
        from torch import distributed

        model = denoising_network(pipe)
        plain = [module for module in model.modules() if not hasattr(module, "_diffusers_hook")]
        processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
        before = [(each, "_parallel_config" in vars(each)) for each in processors]

        def undo() -> None:
            remove_context_parallel(model, model._cp_plan)
            vars(model).pop("_parallel_config", None)  # the class has it: None
            for each, had in before:
                if had:
                    each._parallel_config = None
                elif "_parallel_config" in vars(each):
                    del each._parallel_config
            remove_empty_hooks(plain)

        try:
            degree = {f"{self.kind}_degree": distributed.get_world_size()}
            model.enable_parallelism(config=ContextParallelConfig(**degree))
        except BaseException:
            undo()
            raise
        return undo
