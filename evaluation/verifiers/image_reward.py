"""ImageReward through its own package, which pins old libraries and so is no dependency of ours."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import FastgenError
from fastgen.evaluation.verifiers.base import Verifier
from fastgen.evaluation.verifiers.hub import explained, place

__all__ = ["ImageReward"]


class ImageReward(Verifier):
    """ImageReward-v1.0, without bounds, about -2 to 2.

    The package was written for older versions of transformers and timm than fastgen needs; where it cannot be
    imported with them, `load` says so.

    Args:
        model: what `ImageReward.load` returns: `score(prompt, picture)` gives a number.
        device: where it was loaded.
    """

    name = "image-reward"
    hub_id = "ImageReward-v1.0"

    def __init__(self, model: Any, device: str | torch.device = "cpu") -> None:
        self.model = model
        self.device = torch.device(device)

    @classmethod
    def load(cls, weights: str | None = None, *, device: str = "cpu", dtype: str = "auto") -> ImageReward:
        """By the package's own name of the weights, or from a file.

        Raises:
            FastgenError: the package is not installed or cannot be imported, or its weights cannot be loaded.
        """
        if dtype not in ("auto", "float32"):
            raise FastgenError(f"dtype: {dtype!r} is not allowed, verifier {cls.name} computes in float32")
        where, _ = place(device, "float32")
        try:
            package = importlib.import_module("ImageReward")
        except Exception as error:  # with other versions of its dependencies it fails in many ways
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise FastgenError(
                f"verifier {cls.name} needs the package image-reward: pip install image-reward ({reason})"
            ) from error
        weights = weights or cls.hub_id
        with explained(cls.name, weights):
            made = cls(package.load(weights, device=str(where)), where)
        made.weights = weights
        return made

    def to(self, device: str | torch.device) -> ImageReward:
        self.model.to(device)
        self.device = self.model.device = torch.device(device)  # the model moves its inputs by an attribute
        return self

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        from PIL import Image

        # One at a time: for a list the package returns a number or a list, depending on its length.
        pictures = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
        return torch.tensor(
            [float(self.model.score(prompt, picture)) for prompt, picture in zip(prompts, pictures, strict=True)]
        )
