"""The verifier that comes with fastgen: a yes/no model of ShapesWorld.

It was trained apart from the checker that scores evaluation sets, on other data: a search that asks it does not grade
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.data.scenes import IMAGE_SIZE
from fastgen.evaluation.verifiers.base import ModelVerifier
from fastgen.evaluation.verifiers.hub import check_loaded, explained, find_file, place
from fastgen.models.shapes_verifier import ShapesVerifier as Network
from fastgen.pipelines.loading.checkpoint import embedded_folder
from fastgen.pipelines.search.calibration import read_calibrations
from fastgen.pretrained import load_pretrained

__all__ = ["ShapesVerifier"]


class ShapesVerifier(ModelVerifier):
    """P("yes") that a picture shows its prompt, from 0 to 1. Pictures of another size are scaled to 64 x 64.

    Args:
        model: the network.
        kwargs: `batch_size` and `cache_size` of `ModelVerifier`.
    """

    name = "shapes-verifier"
    range = (0.0, 1.0)
    model: Network

    def __init__(self, model: Network, **kwargs: int) -> None:
        super().__init__(model, **kwargs)

    @classmethod
    def load(
        cls, weights: str | None = None, *, device: str = "cpu", dtype: str = "auto", **kwargs: int
    ) -> ShapesVerifier:
        """The embedded one, or that of a folder written by `fastgen train verifier`; with the thresholds for models
        that lie in `thresholds/` there.

        Raises:
            FastgenError: something is missing or broken; the line says what.
        """
        folder = Path(weights) if weights else embedded_folder(cls.name)
        where, kind = place(device, dtype, "float32")
        find_file(cls.name, str(folder), ("config.json",))
        with explained(cls.name, folder):
            network, info = load_pretrained(Network, folder, torch_dtype=kind, output_loading_info=True)
        check_loaded(cls.name, folder, info)
        made = cls(network.to(where), **kwargs)
        made.weights = str(folder) if weights else cls.name
        made.thresholds = read_calibrations(folder / "thresholds")
        return made

    def _encode(self, prompts: list[str]) -> Sequence[tuple[Tensor, Tensor]]:
        words, mask = self.model.encode_text(self.model.tokens(prompts).to(self.device))
        return list(zip(words, mask, strict=True))

    def _score_batch(self, images: Tensor, sides: list[Any]) -> Tensor:
        pixels = images.to(self.dtype).div(127.5).sub(1.0)
        if images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
            pixels = nn.functional.interpolate(pixels, (IMAGE_SIZE, IMAGE_SIZE), mode="area")
        words, mask = (torch.stack(part) for part in zip(*sides, strict=True))
        return self.model.answer(words, mask, self.model.encode_picture(pixels)).sigmoid()
