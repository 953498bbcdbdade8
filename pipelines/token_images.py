"""Shared by the pipelines of autoregressive image models: prompts, generators, and pictures of decoded tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import PIL.Image
import torch
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from transformers import PreTrainedModel

from fastgen.accounting import Stats
from fastgen.checks import check_choice, check_finite, check_generator, check_integer
from fastgen.errors import FastgenError
from fastgen.pipelines.schema import check_prompt

__all__ = ["NetworksMixin", "OutputType", "TokenImageOutput", "as_output", "one_per_image", "one_prompt_per_image"]

OutputType = Literal["pil", "np", "pt", "tokens"]
#: Images of a prompt in one call.
MOST_IMAGES = 100_000


class NetworksMixin:
    """A pipeline that refuses what is no network in the place of one, when it is put there."""

    def __setattr__(self, name: str, value: Any) -> None:
        _check_network(name, value)
        super().__setattr__(name, value)

    def register_modules(self, **modules: Any) -> None:
        for name, value in modules.items():
            _check_network(name, value)
        super().register_modules(**modules)  # type: ignore[misc]

    def check_saves(self) -> None:
        """Refuse a network that `DiffusionPipeline.save_pretrained` would leave out without an error."""
        for name, part in self.components.items():  # type: ignore[attr-defined]
            if isinstance(part, torch.nn.Module) and not isinstance(part, ModelMixin | PreTrainedModel):
                raise FastgenError(
                    f"{name}: {type(part).__name__} is no ModelMixin or PreTrainedModel, only these can be saved"
                )


def _check_network(name: str, value: object) -> None:
    absent = value is None and name in ("drafter", "heads")
    if name in ("model", "drafter", "heads") and not absent and not isinstance(value, torch.nn.Module):
        raise FastgenError(f"{name}: needs a network, got {type(value).__name__}")


@dataclass
class TokenImageOutput(BaseOutput):
    """
    Args:
        images: list of B PIL images, or [B, H, W, 3] float array in [0, 1] ("np"), or [B, 3, H, W] float tensor in
            [0, 1] ("pt"), or the tokens ("tokens").
        tokens: [B, N] int64 codebook indices, row-major.
        stats: what the call did.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    tokens: torch.Tensor
    stats: Stats


def one_prompt_per_image(prompt: Any, num_images: Any, negative_prompt: Any, output_type: str) -> list[str]:
    """The texts, one per image.

    Raises:
        FastgenError, TypeError: an argument outside its range.
    """
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"prompt: needs a string or a list of strings, got {type(prompt).__name__}")
    if not texts:
        raise FastgenError("prompt: an empty list is not allowed")
    for text in texts:
        check_prompt(text)
    check_integer("num_images_per_prompt", num_images, 1, MOST_IMAGES)
    if negative_prompt is not None:
        raise FastgenError(
            "negative_prompt: this model takes none; the row without a prompt is the prompt blanked out"
        )
    check_choice("output_type", output_type, get_args(OutputType))
    return [text for text in texts for _ in range(num_images)]


def one_per_image(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[torch.Generator]:
    """One generator per image; a single one drives a single image, or draws a seed for each of several.

    Raises:
        FastgenError: no generator, or another number of them than of images.
    """
    check_generator(generator, count)
    if isinstance(generator, list | tuple):
        return list(generator)
    if generator is not None and count == 1:
        return [generator]  # type: ignore[list-item]
    device = "cpu" if generator is None else generator.device  # type: ignore[union-attr]
    seeds = torch.randint(2**63 - 1, (count,), generator=generator, device=device)  # type: ignore[arg-type]
    return [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]


def as_output(pixels: torch.Tensor, output_type: str) -> Any:
    """Pictures [B, H, W, 3] in [0, 1] as "pil", "np" or "pt".

    Raises:
        NotFiniteError: some pixels are NaN or infinite.
    """
    check_finite(pixels, "decoded pixels")
    if output_type == "pt":
        return pixels.permute(0, 3, 1, 2).contiguous()
    array = pixels.cpu().numpy()
    if output_type == "np":
        return array
    return DiffusionPipeline.numpy_to_pil(array)
