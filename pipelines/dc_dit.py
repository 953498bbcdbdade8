"""`DCDiTPipeline`: the stock DiT pipeline with the knobs of dynamic chunking (arXiv 2603.06351)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTPipeline

from fastgen.models.elastic import Schedule
from fastgen.pipelines.elastic import LOSS, DCPipelineMixin, DCPipelineOutput, run_elastic
from fastgen.pipelines.stock_arguments import check_call, check_labels, given_arguments
from fastgen.pipelines.watching import watched_call


class DCDiTPipeline(DCPipelineMixin, DiTPipeline):
    """Class-conditional images with a `DCDiTTransformer2DModel`. Loss contract: lossy."""

    loss = LOSS

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        tail_drop: Schedule = 0.0,
        uncond_tail_drop: Schedule | None = None,
        token_budget: int | None = None,
        output_chunks: bool = False,
    ) -> DCPipelineOutput | tuple[Any]:
        """Draw images; all arguments of the stock pipeline, and the knobs of `DCZImagePipeline.__call__`.

        Raises:
            ValueError: an argument that the stock pipeline cannot take, a knob out of range, or tail drops together
                with a budget.
            NotFiniteError: latents or pixels are not numbers.
        """
        arguments = given_arguments(DiTPipeline, locals())
        images = check_labels(class_labels, self.transformer.config.get("num_classes", 1000))
        check_call(arguments, images, ("pil", "np", "pt"))
        return run_elastic(
            self,
            watched_call(self, super().__call__),
            arguments,
            tail_drop=tail_drop,
            uncond_tail_drop=uncond_tail_drop,
            token_budget=token_budget,
            output_chunks=output_chunks,
        )
