"""Context parallelism of diffusers as a part: several processes compute one picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastgen.pipelines.accelerate.part import Part, Undo, added_attributes, denoising_network

__all__ = ["ContextParallel"]


@dataclass(frozen=True)
class ContextParallel(Part):
    """The tokens of one picture are spread over all processes of `torch.distributed`, by `enable_parallelism`.

    Every process calls the pipeline with the same arguments and gets the same picture. Processes exchange attention
    heads (Ulysses); diffusers' ring attention does not work with PyTorch's own attention.
    """

    name = "context_parallel"
    loss = "exact"

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
        clean = added_attributes(model)
        processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
        before = [(each, "_parallel_config" in vars(each)) for each in processors]

        def undo() -> None:
            remove_context_parallel(model, model._cp_plan)
            for each, had in before:
                if had:
                    each._parallel_config = None
                elif "_parallel_config" in vars(each):
                    del each._parallel_config
            clean()

        try:
            # "Anything": lengths and numbers of heads need not be multiples of the number of processes.
            config = ContextParallelConfig(ulysses_degree=distributed.get_world_size(), ulysses_anything=True)
            model.enable_parallelism(config=config)
        except BaseException:
            undo()
            raise
        return undo
