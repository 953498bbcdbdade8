"""`DCZImagePipeline`: the stock Z-Image pipeline with the knobs of dynamic chunking (arXiv 2603.06351)."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from diffusers import ZImagePipeline

from fastgen.models.elastic import Schedule
from fastgen.pipelines.elastic import LOSS, DCPipelineOutput, FromPipeMixin, run_elastic, with_knobs
from fastgen.pretrained import load_pretrained


class DCZImagePipeline(FromPipeMixin, ZImagePipeline):
    """Text to image with a `DCZImageTransformer2DModel`. Loss contract: lossy."""

    loss = LOSS

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As in diffusers; code that comes with a model is refused."""
        return load_pretrained(super(), pretrained_model_name_or_path, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        tail_drop: Schedule = 0.0,
        uncond_tail_drop: Schedule | None = None,
        token_budget: int | None = None,
        output_chunks: bool = False,
        **kwargs: Any,
    ) -> DCPipelineOutput | tuple[Any]:
        """Draw images; all arguments of the stock pipeline, and:

        Args:
            tail_drop: share of the natural tokens to drop: a number in [0, 1), a list with one per step, or a function
                of (step, sigma).
            uncond_tail_drop: the same for the unconditional branch (Lite-CFG); None takes `tail_drop`.
            token_budget: exact number of image tokens of every branch, in place of the tail drops.
            output_chunks: return which tokens were kept in each step.

        Raises:
            ValueError: a knob out of range, or tail drops together with a budget.
        """
        arguments = dict(inspect.signature(ZImagePipeline.__call__).bind(self, *args, **kwargs).arguments)
        del arguments["self"]
        for name in ("prompt", "negative_prompt"):  # the stock pipeline writes into the lists it is given
            if isinstance(arguments.get(name), list):
                arguments[name] = list(arguments[name])
        return run_elastic(
            self,
            super().__call__,
            arguments,
            tail_drop=tail_drop,
            uncond_tail_drop=uncond_tail_drop,
            token_budget=token_budget,
            output_chunks=output_chunks,
        )

    __call__.__signature__ = with_knobs(ZImagePipeline.__call__)  # type: ignore[attr-defined]
