"""Pictures under way: what a pipeline would draw if it stopped at this step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastgen.io import encode_png
from fastgen.pipelines.generation import Progress

__all__ = ["Partials", "Watched"]

logger = logging.getLogger(__name__)


class Partials:
    """Pictures of the steps that share a schedule evenly, for the pictures of a batch that ask for some.

    Args:
        pipe: the pipeline that draws.
        wanted: how many partial pictures each picture of the batch wants.
    """

    def __init__(self, pipe: Any, wanted: Sequence[int]) -> None:
        self._pipe, self._wanted = pipe, wanted
        self._before: Tensor | None = None
        self._usable = any(wanted) and hasattr(pipe, "vae") and hasattr(pipe, "scheduler")

    def after(self, progress: Progress) -> Iterator[tuple[int, bytes]]:
        """Place in the batch and PNG of each partial picture to send after this step."""
        latents = progress.latents
        if not self._usable or latents is None or progress.step >= progress.steps:
            return
        places = range(progress.images_done, progress.images_done + progress.images_now)
        due = [place for place in places if progress.step in _steps(self._wanted[place], progress.steps)]
        if due:
            try:
                pictures = self._decoded(latents, progress.step)
            except Exception as error:  # a picture under way is worth no failure
                logger.info("no partial pictures of %s: %s", type(self._pipe).__name__, error)
                self._usable = False
                return
            for place in due:
                yield place, pictures[place - progress.images_done]
        self._before = latents

    @torch.no_grad()
    def _decoded(self, latents: Tensor, step: int) -> list[bytes]:
        from fastgen.evaluation.chunk_maps import decoded

        if latents.ndim != 4:
            raise ValueError(f"latents of shape {tuple(latents.shape)}")
        return [encode_png(picture, {}) for picture in decoded(self._pipe.vae, self._expected(latents, step))]

    def _expected(self, latents: Tensor, step: int) -> Tensor:
        """x_0 as the last step saw it: a flow's step is x' = x + (s' - s) v and its end x' - s' v."""
        sigmas = getattr(self._pipe.scheduler, "sigmas", None)
        if self._before is None or sigmas is None or "FlowMatch" not in type(self._pipe.scheduler).__name__:
            return latents
        now, before = float(sigmas[step]), float(sigmas[step - 1])
        return latents - now * (latents - self._before) / (now - before)


def _steps(wanted: int, steps: int) -> set[int]:
    """The steps of `steps` after which a partial picture is sent."""
    return {max(1, round((i + 1) * steps / (wanted + 1))) for i in range(wanted)}


class Watched:
    """A verifier that shows what it scores.

    Args:
        verifier: that scores.
        show: called with PNG and score of every candidate.
    """

    def __init__(self, verifier: Any, show: Callable[[bytes, float], None]) -> None:
        self._verifier, self._show = verifier, show

    def __getattr__(self, name: str) -> Any:
        return getattr(self._verifier, name)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Verifier.score`."""
        scores: Tensor = self._verifier.score(images, prompts)
        for image, score in zip(images, scores.tolist(), strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            picture.thumbnail((128, 128))
            self._show(encode_png(picture, {}), score)
        return scores
