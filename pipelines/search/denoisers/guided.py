"""What adapters of flow-matching pipelines share: the user's arguments, and guidance in one forward pass."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from fastgen.checks import check_integer, check_number
from fastgen.pipelines.search.denoisers.base import FlowDenoiser

__all__ = ["GuidedFlowDenoiser"]

logger = logging.getLogger(__name__)


class GuidedFlowDenoiser(FlowDenoiser):
    """A flow-matching model with classifier-free guidance, the prompts and the negative prompts in one batch.

    An adapter gives `forward` in place of `velocity`; the rows of its texts are the P prompts, then what `negatives`
    gives: one negative prompt for all, or P of them.
    Between evaluations latents are float32, whatever the model's dtype.

    Attributes:
        height, width: of a picture.
        scale: of the guidance; read where `forwards` is 2.
    """

    height: int
    width: int
    scale: float = 1.0

    @abstractmethod
    def forward(self, latents: Tensor, times: Tensor, rows: Tensor) -> Tensor:
        """The model's velocity [k, …], float32, of latents [k, …] at times [k] with texts `rows` [k]."""

    def velocity(self, latents: Tensor, times: Tensor, which: Tensor) -> Tensor:
        if self.forwards == 1:
            return self.forward(latents, times, which)
        each = isinstance(self.settings.negative_prompt, list | tuple)
        rows = torch.cat([which, len(self.prompts) + (which if each else torch.zeros_like(which))])
        cond, uncond = self.forward(torch.cat([latents, latents]), times.repeat(2), rows).chunk(2)
        return self.guide(cond, uncond)

    def guide(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """Both velocities [k, …] put together."""
        return uncond + self.scale * (cond - uncond)

    # ---- for `prepare` ----

    def negatives(self, default: str = "") -> list[str]:
        """Negative prompts to encode after the prompts: none without guidance, one for all, or one for each."""
        given = self.settings.negative_prompt
        if self.forwards == 1:
            return []
        return [given or default] if given is None or isinstance(given, str) else list(given)

    def ask(self, defaults: dict[str, Any], *extra: str, longest: int | None = None) -> dict[str, Any]:
        """The pipeline's arguments, the user's in place of its defaults.

        Args:
            defaults: of the pipeline.
            extra: what `Settings.extra` may have.
            longest: the greatest `max_sequence_length`.

        Raises:
            ValueError: an unknown extra argument, or one that is not in its range.
        """
        settings = self.settings
        if unknown := sorted(set(settings.extra) - set(extra)):
            name = type(self.pipe).__name__
            raise ValueError(f"{', '.join(unknown)}: a search of {name} takes none such, but {', '.join(extra)}")
        own = {name: value for name, value in vars(settings).items() if name != "extra" and value is not None}
        asked = {**defaults, **settings.extra, **own}
        asked["max_sequence_length"] = check_integer("max_sequence_length", asked["max_sequence_length"], 1, longest)
        if "true_cfg_scale" in extra:
            asked["true_cfg_scale"] = check_number("true_cfg_scale", asked["true_cfg_scale"])
        return asked

    def size(self, asked: dict[str, Any], default: int, multiple: int) -> None:
        """Set `height` and `width`.

        Raises:
            ValueError: one that is not a multiple.
        """
        self.height, self.width = (
            default if asked[name] is None else int(asked[name]) for name in ("height", "width")
        )
        for name, value in (("height", self.height), ("width", self.width)):
            if value < 1 or value % multiple:
                raise ValueError(f"{name}: {value} is not allowed, needs a multiple of {multiple}")

    def true_guidance(self, asked: dict[str, Any]) -> None:
        """Set `scale` and `forwards` as pipelines with `true_cfg_scale` do: it also needs a negative prompt."""
        self.scale, negative = asked["true_cfg_scale"], asked["negative_prompt"]
        self.forwards = 2 if self.scale > 1 and negative is not None else 1
        if self.forwards == 1 and (negative is not None or self.settings.extra.get("true_cfg_scale", 1) > 1):
            logger.warning("no true guidance: that takes both true_cfg_scale > 1 and a negative_prompt")

    # ---- for `forward` ----

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        dtype: torch.dtype = self.pipe.transformer.dtype
        return dtype

    def clock(self, times: Tensor) -> Tensor:
        """Training timesteps [k], float32, of times [k]."""
        return (times * self.pipe.scheduler.config.num_train_timesteps).to(self.device, torch.float32)
