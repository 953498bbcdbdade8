"""`DCZImagePipeline`: the stock Z-Image pipeline with the knobs of dynamic chunking (arXiv 2603.06351)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ZImagePipeline

from fastgen.checks import check_integer
from fastgen.errors import FastgenError
from fastgen.models.elastic import Schedule
from fastgen.pipelines.elastic import LOSS, DCPipelineMixin, DCPipelineOutput, run_elastic
from fastgen.pipelines.prompts import check_prompt_lengths
from fastgen.pipelines.stock_arguments import check_call, check_texts, given_arguments
from fastgen.pipelines.watching import watched_call


class DCZImagePipeline(DCPipelineMixin, ZImagePipeline):
    """Text to image with a `DCZImageTransformer2DModel`. Loss contract: lossy."""

    loss = LOSS

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 5.0,
        cfg_normalization: bool = False,
        cfg_truncation: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: list[torch.Tensor] | None = None,
        negative_prompt_embeds: list[torch.Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        *,
        tail_drop: Schedule = 0.0,
        uncond_tail_drop: Schedule | None = None,
        token_budget: int | None = None,
        output_chunks: bool = False,
    ) -> DCPipelineOutput | tuple[Any]:
        """Draw images; all arguments of the stock pipeline, and:

        Args:
            tail_drop: share of the natural tokens to drop: a number in [0, 1), a list with one per step, or a function
                of (step, sigma).
            uncond_tail_drop: the same for the unconditional branch (Lite-CFG); None takes `tail_drop`.
            token_budget: exact number of image tokens of every branch, in place of the tail drops.
            output_chunks: return which tokens were kept in each step.

        Raises:
            ValueError: an argument that the stock pipeline cannot take, a knob out of range, or tail drops together
                with a budget.
            NotFiniteError: latents or pixels are not numbers.
        """
        arguments = given_arguments(ZImagePipeline, locals())
        prompts = _prompts(arguments)
        images = prompts * check_integer("num_images_per_prompt", arguments.get("num_images_per_prompt", 1), 1)
        check_call(arguments, images, ("pil", "np", "pt", "latent"))
        given = (arguments.get("prompt"), arguments.get("negative_prompt"))
        texts = [text for each in given for text in ([each] if isinstance(each, str) else each or ())]
        check_prompt_lengths(self, texts, arguments.get("max_sequence_length"))
        return run_elastic(
            self,
            watched_call(self, super().__call__),
            arguments,
            tail_drop=tail_drop,
            uncond_tail_drop=uncond_tail_drop,
            token_budget=token_budget,
            output_chunks=output_chunks,
        )


def _prompts(arguments: dict[str, Any]) -> int:
    """How many prompts there are. Lists become copies, as the stock pipeline writes into them.

    Raises:
        FastgenError: no prompt and no embeddings, both, or a negative prompt too many or too few.
    """
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    if (prompt is None) == (embeds is None):
        raise FastgenError("prompt, prompt_embeds: needs one of them, and not both")
    if prompt is None:
        check_call({"prompt_embeds": embeds}, 1, ("pil",))
        return len(embeds)  # type: ignore[arg-type]
    check_texts("prompt", prompt)
    count = 1 if isinstance(prompt, str) else len(prompt)
    arguments["prompt"] = [prompt] if isinstance(prompt, str) else list(prompt)
    negative = arguments.get("negative_prompt")
    if negative is not None:
        check_texts("negative_prompt", negative, count)
        arguments["negative_prompt"] = [negative] * count if isinstance(negative, str) else list(negative)
    return count
