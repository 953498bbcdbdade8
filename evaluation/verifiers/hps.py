"""HPSv2.1 on open_clip: the cosine of a CLIP ViT-H/14 tuned on human preferences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import FastgenError
from fastgen.evaluation.verifiers.base import ModelVerifier
from fastgen.evaluation.verifiers.hub import explained, find_file, place
from fastgen.evaluation.verifiers.pixels import fit_and_pad
from fastgen.pretrained import open_clip_folder

__all__ = ["HPS"]

ARCHITECTURE = "ViT-H-14"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class HPS(ModelVerifier):
    """HPSv2.1: cosine, from -1 to 1, in practice about 0.2 to 0.35.

    Pictures keep their aspect ratio: the longer side becomes 224 pixels, the rest is black. This follows the package
    `hpsv2` with a torchvision that antialiases tensors (0.17 or newer); it computes in half precision on a GPU, we
    do in float32 unless another type is asked for.

    Args:
        model: an open_clip CLIP.
        tokenizer: of open_clip: texts -> int64 [n, length].
        kwargs: `batch_size` and `cache_size` of `ModelVerifier`.
    """

    name = "hps-v2.1"
    range = (-1.0, 1.0)
    hub_id = "xswu/HPSv2"
    files = ("HPS_v2.1_compressed.pt",)

    def __init__(self, model: Any, tokenizer: Any, **kwargs: int) -> None:
        super().__init__(model, **kwargs)
        self.clip = model
        self.tokenizer = tokenizer
        size = model.visual.image_size
        self.image_size: int = size if isinstance(size, int) else size[0]

    @classmethod
    def load(cls, weights: str | None = None, *, device: str = "cpu", dtype: str = "auto", **kwargs: int) -> HPS:
        """From HPS_v2.1_compressed.pt, or a folder or Hub id with it.

        The network is open_clip's ViT-H-14, or what an open_clip_config.json next to the file describes.

        Raises:
            FastgenError: open_clip is not installed, or the file is missing or broken.
        """
        try:
            import open_clip
        except ImportError as error:
            raise FastgenError(
                f"verifier {cls.name} needs the package open-clip-torch: pip install open-clip-torch ({error})"
            ) from error
        weights = weights or cls.hub_id
        where, kind = place(device, dtype, "float32")
        file = find_file(cls.name, weights, cls.files)
        described = (file.parent / "open_clip_config.json").is_file()
        architecture = open_clip_folder(file.parent) if described else ARCHITECTURE
        with explained(cls.name, file):
            model = open_clip.create_model(architecture, load_weights=False)
            model.load_state_dict(_state_dict(file))
            tokenizer = open_clip.get_tokenizer(architecture)
        made = cls(model.to(device=where, dtype=kind), tokenizer, **kwargs)
        made.weights = weights
        return made

    def _encode(self, prompts: list[str]) -> Sequence[Tensor]:
        found = self.clip.encode_text(self.tokenizer(prompts).to(self.device))
        return list(nn.functional.normalize(found.float(), dim=-1))

    def _score_batch(self, images: Tensor, sides: list[Any]) -> Tensor:
        pixels = fit_and_pad(images, self.image_size)
        mean, std = pixels.new_tensor(MEAN).view(3, 1, 1), pixels.new_tensor(STD).view(3, 1, 1)
        found = self.clip.encode_image(((pixels - mean) / std).to(self.dtype))
        return (nn.functional.normalize(found.float(), dim=-1) * torch.stack(sides)).sum(-1)


def _state_dict(file: Path) -> dict[str, Tensor]:
    found = torch.load(file, map_location="cpu", weights_only=True)
    return found.get("state_dict", found)
