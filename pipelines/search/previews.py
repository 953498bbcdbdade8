"""Cheap pictures of samples that are under way: what a verifier sees of a candidate need not be a full decode.

Ends of trajectories are always decoded in full; only the scores of what comes before them change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.accounting import phase
from fastgen.checks import check_finite
from fastgen.drafters.targets.base import unit_range
from fastgen.pipelines.search.denoisers.base import Denoiser, as_bytes
from fastgen.pipelines.search.interpolants import Prediction

__all__ = ["Preview", "PreviewOption", "check_preview", "preview_of"]

#: Makes pictures [k, 3, H, W] uint8 of predictions of k samples.
Preview = Callable[[Denoiser, Prediction], Tensor]
#: "full" decodes as the pipeline does. "pooled" decodes latents averaged 2 x 2, for a quarter of the cost, and
#: enlarges the picture. Else a decoder, an object with `decode` (`diffusers.AutoencoderTiny`) or a function: latents
#: [k, C, h, w], as the model works on them, to pictures [k, 3, H, W] in [-1, 1]. One that has `scaling_factor` and
#: `shift_factor` in its `config` is given latents / scaling_factor + shift_factor, as diffusers does with the VAE of a
#: pipeline; those of `AutoencoderTiny` are 1 and 0.
PreviewOption = Literal["full", "pooled"] | Any


def preview_of(option: PreviewOption, denoiser: Denoiser) -> Preview | None:
    """The preview that was asked for; None: a full decode.

    Raises:
        ValueError: an unknown name, something that decodes nothing, a decoder of latents of other channels, or latents
            that are no image.
    """
    check_preview(option)
    if option == "full":
        return None
    grid = denoiser.unpacked(torch.zeros(denoiser.shape))
    if grid.ndim < 4:
        name = type(denoiser.pipe).__name__
        raise ValueError(f"preview: latents of {name} are tokens of shape {tuple(grid.shape)}; only full decodes them")
    if option == "pooled":
        return pooled
    decode: Any = getattr(option, "decode", option)
    config = getattr(option, "config", None) or {}
    channels = grid.shape[1]
    if config.get("latent_channels", channels) != channels:
        raise ValueError(
            f"preview: {type(option).__name__} decodes latents of {config['latent_channels']} channels, "
            f"{type(denoiser.pipe).__name__} has {channels}"
        )
    dtype = next(option.parameters(), torch.empty(0)).dtype if isinstance(option, torch.nn.Module) else None
    return _Decoder(decode, config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0, dtype)


def check_preview(option: PreviewOption) -> None:
    """Check what needs no model.

    Raises:
        ValueError: an unknown name, or something that decodes nothing.
    """
    if isinstance(option, str):
        if option not in ("full", "pooled"):
            raise ValueError(f"preview: {option!r} is unknown, there are full, pooled, or a decoder")
    elif not callable(getattr(option, "decode", option)):
        raise ValueError(f"preview: {type(option).__name__} has no decode(latents)")


@torch.no_grad()
def pooled(denoiser: Denoiser, prediction: Prediction) -> Tensor:
    """See `PreviewOption`."""
    with phase("preview"):
        grid = denoiser.unpacked(prediction.at(denoiser.final))
        height, width = grid.shape[-2:]
        half = (height + 1) // 2, (width + 1) // 2
        small = F.interpolate(grid.flatten(0, -3).unsqueeze(1), half, mode="area").view(*grid.shape[:-2], *half)
        pictures = denoiser.decoded(small).float()
        if denoiser.resizes:
            return as_bytes(pictures)
        size = [round(pictures.shape[axis] * grid.shape[axis] / small.shape[axis]) for axis in (-2, -1)]
        return as_bytes(F.interpolate(pictures, size, mode="bilinear"))


@dataclass(frozen=True)
class _Decoder:
    """A decoder in the place of the pipeline's."""

    decode: Callable[[Tensor], Any]
    scaling: float
    shift: float
    dtype: torch.dtype | None

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser, prediction: Prediction) -> Tensor:
        with phase("preview"):
            grid = denoiser.unpacked(prediction.at(denoiser.final))
            grid = grid.squeeze(2) if grid.ndim == 5 else grid  # a video of one frame
            found = self.decode((grid / self.scaling + self.shift).to(self.dtype or grid.dtype))
            found = found if isinstance(found, Tensor) else found[0]
            if found.ndim != 4 or found.shape[:2] != (len(grid), 3):
                raise ValueError(f"preview: gave shape {tuple(found.shape)}, needs ({len(grid)}, 3, height, width)")
            check_finite(found, "pixels of the preview")
            return as_bytes(unit_range(found))
