"""The interface of a verifier, and the shared part of verifiers with a network: batches and cached prompts.

A search scores hundreds of pictures of the same prompt, so what depends only on the prompt (a text embedding, token
numbers) is made once and kept for the prompts used last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.pipelines.search.calibration import Calibration

__all__ = ["ModelVerifier", "Verifier", "check_images", "picture_scores"]

Own = TypeVar("Own", bound="Verifier")
OwnModel = TypeVar("OwnModel", bound="ModelVerifier")


def check_images(images: Any, prompts: Any) -> None:
    """Refuse what no verifier can score.

    Raises:
        ValueError: `images` are not uint8 [k, 3, H, W], or `prompts` are not k texts.
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"images: needs a tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8:
        raise ValueError(f"images: needs dtype uint8 with values from 0 to 255, got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 1:
        raise ValueError(f"images: needs shape [k, 3, H, W], got {list(images.shape)}")
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts: needs a list of texts, got {type(prompts).__name__}")
    if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise ValueError(f"prompts: needs texts, got {type(wrong[0]).__name__}")
    if len(prompts) != len(images):
        raise ValueError(f"prompts: needs {len(images)}, one for each picture, got {len(prompts)}")


class Verifier(ABC):
    """Scores pictures for prompts; more is better.

    Attributes:
        name: as `load_verifier` knows it; results quote it.
        weights: Hub id or folder that the weights come from.
        range: the least and the largest score there can be; None: no bounds are known.
        thresholds: that were measured for it, one a model.
    """

    name: str = ""
    weights: str = ""
    range: tuple[float, float] | None = None
    thresholds: tuple[Calibration, ...] = ()

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each picture for its own prompt.

        Args:
            images: uint8 [k, 3, H, W], RGB.
            prompts: k texts.

        Returns:
            float32 [k].

        Raises:
            ValueError: images or prompts of another kind, or not as many of one as of the other.
        """
        check_images(images, prompts)
        return self._score(images, list(prompts)).float()

    @abstractmethod
    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """`score` of checked input: [k]."""

    @abstractmethod
    def to(self: Own, device: str | torch.device) -> Own:
        """Move the networks; returns the verifier itself."""


def picture_scores(
    verifier: Verifier, pictures: Iterable[np.ndarray], prompts: Sequence[str], batch: int = 64
) -> np.ndarray:
    """Scores of many pictures, of which no more than a batch are held at a time.

    Args:
        verifier: scores them.
        pictures: uint8 [H, W, 3] each, all of one size; may be loaded as they are taken.
        prompts: n texts, one for each.
        batch: pictures at a time.

    Returns:
        float64 [n].
    """
    rows, scores = iter(pictures), list[float]()
    for first in range(0, len(prompts), batch):
        asked = prompts[first : first + batch]
        images = torch.from_numpy(np.stack(list(islice(rows, len(asked))))).permute(0, 3, 1, 2).contiguous()
        scores += verifier.score(images, asked).tolist()
    return np.array(scores, dtype=np.float64)


class ModelVerifier(Verifier):
    """A verifier with a network: scores in batches, and keeps the prompt side of the prompts used last.

    A subclass gives `_score_batch` and, where there is work in it, `_encode`.

    Args:
        model: all its networks; set to evaluation mode and frozen.
        batch_size: pictures in one forward pass; changes scores by rounding only.
        cache_size: prompts remembered; 0: none.
    """

    def __init__(self, model: nn.Module, *, batch_size: int = 32, cache_size: int = 1024) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: needs an integer >= 1, got {batch_size}")
        if cache_size < 0:
            raise ValueError(f"cache_size: needs an integer >= 0, got {cache_size}")
        self.model = model.eval().requires_grad_(False)
        self.batch_size = batch_size
        self.cache_size = cache_size
        self._sides: OrderedDict[str, Any] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def to(self: OwnModel, device: str | torch.device) -> OwnModel:
        self.model.to(device)
        self._sides.clear()  # they lie on the old device
        return self

    def _encode(self, prompts: list[str]) -> Sequence[Any]:
        """The prompt side of different prompts, one item each."""
        return prompts

    @abstractmethod
    def _score_batch(self, images: Tensor, sides: list[Any]) -> Tensor:
        """Scores [k] of pictures uint8 [k, 3, H, W] on the verifier's device, with what `_encode` made."""

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        parts = [torch.zeros(0, device=self.device)]
        for first in range(0, len(prompts), self.batch_size):
            part = slice(first, first + self.batch_size)
            parts.append(self._score_batch(images[part].to(self.device), self._remembered(prompts[part])).float())
        return torch.cat(parts)

    def _remembered(self, prompts: list[str]) -> list[Any]:
        """The prompt side of each prompt, made for new ones only."""
        known = {prompt: self._sides[prompt] for prompt in prompts if prompt in self._sides}
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if new:
            known.update(zip(new, self._encode(new), strict=True))
        for prompt, side in known.items():
            self._sides[prompt] = side
            self._sides.move_to_end(prompt)
        while len(self._sides) > self.cache_size:
            self._sides.popitem(last=False)
        return [known[prompt] for prompt in prompts]
