"""What the pipelines of autoregressive image models share: prompts, generators, and pictures of decoded tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

__all__ = ["OutputType", "TokenImageOutput", "as_output", "one_per_image", "one_prompt_per_image"]

OutputType = Literal["pil", "np", "pt", "tokens"]


@dataclass
class TokenImageOutput(BaseOutput):
    """
    Args:
        images: list of B PIL images, or [B, H, W, 3] float array in [0, 1] ("np"), or [B, 3, H, W] float tensor in
            [0, 1] ("pt"), or the tokens ("tokens").
        tokens: [B, N] int64 codebook indices, row-major.
        stats: what the call did, see `fastgen.accounting.Stats.as_dict`.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    tokens: torch.Tensor
    stats: dict[str, Any]


def one_prompt_per_image(prompt: Any, num_images: Any, negative_prompt: Any, output_type: str) -> list[str]:
    """The texts, one per image.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"prompt: needs a string or a list of strings, got {type(prompt).__name__}")
    if not texts or not all(text.strip() for text in texts):
        raise ValueError("prompt: an empty text is not allowed")
    if isinstance(num_images, bool) or not isinstance(num_images, int) or num_images < 1:
        raise ValueError(f"num_images_per_prompt: {num_images!r} is not allowed, needs an integer >= 1")
    if negative_prompt is not None:
        raise ValueError("negative_prompt: this model takes none; the row without a prompt is the prompt blanked out")
    if output_type not in (allowed := ("pil", "np", "pt", "tokens")):
        raise ValueError(f"output_type: {output_type!r} is not allowed, needs one of {', '.join(allowed)}")
    return [text for text in texts for _ in range(num_images)]


def one_per_image(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[torch.Generator]:
    """One generator per image; a single one drives a single image, or draws a seed for each of several.

    Raises:
        ValueError: another number of generators than of images.
    """
    if isinstance(generator, list | tuple):
        if len(generator) != count:
            raise ValueError(f"generator: {len(generator)} generators for {count} images; needs one per image")
        return list(generator)
    if generator is not None and count == 1:
        return [generator]  # type: ignore[list-item]
    device = "cpu" if generator is None else generator.device  # type: ignore[union-attr]
    seeds = torch.randint(2**63 - 1, (count,), generator=generator, device=device)  # type: ignore[arg-type]
    return [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]


def as_output(pixels: torch.Tensor, output_type: str) -> Any:
    """Pictures [B, H, W, 3] in [0, 1] as "pil", "np" or "pt"."""
    if output_type == "pt":
        return pixels.permute(0, 3, 1, 2).contiguous()
    array = pixels.cpu().numpy()
    if output_type == "np":
        return array
    return [PIL.Image.fromarray(image) for image in (array * 255).round().astype(np.uint8)]
