"""The colour classifier of GenEval: zero-shot CLIP ViT-L/14 on the object cut out of its picture.

The weights "openai" were trained with QuickGELU. Newer open_clip builds the plain "ViT-L-14" with GELU around them,
with a warning and other colours (open_clip #771), so QuickGELU is forced here and its absence is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.detections import Detections
from fastgen.evaluation.geneval.prompts import COLORS
from fastgen.pretrained import open_clip_folder

ARCHITECTURE, TAG = "ViT-L-14", "openai"
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = (0x99, 0x99, 0x99)
_WHO = "colour classifier"
_USE = "name a file of weights or an open_clip folder with --color-model"


class ClipColors:
    """CLIP behind the `ColorClassifier` protocol.

    Args:
        model: an open_clip CLIP with QuickGELU.
        preprocess: picture -> pixels [3, h, w], as open_clip's validation transform.
        tokenizer: of open_clip: texts -> int64 [n, length].
        weights: what the user named.
        device: where it runs; in half precision on CUDA, as in the official scorer.

    Raises:
        FastgenError: the model has another activation.
    """

    color_names: tuple[str, ...] = COLORS

    def __init__(
        self, model: Any, preprocess: Any, tokenizer: Any, *, weights: str = "", device: str | torch.device = "cpu"
    ) -> None:
        require_quick_gelu(model, weights or "the model")
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.preprocess, self.tokenizer, self.weights = preprocess, tokenizer, weights
        self._heads: dict[str, Tensor] = {}

    @classmethod
    def load(cls, weights: str = TAG, *, device: str | torch.device = "cpu") -> ClipColors:
        """ViT-L-14 with open_clip's tag or file `weights`, or the model of an open_clip folder.

        Raises:
            FastgenError: open_clip is not installed, there are no such weights, or they do not fit.
        """
        try:
            import open_clip
        except ImportError as error:
            raise FastgenError(
                f"{_WHO}: needs the package open-clip-torch: pip install open-clip-torch ({error})"
            ) from error
        from fastgen.evaluation.verifiers.hub import explained, find_file

        place = Path(weights)
        if place.is_dir():
            find_file(_WHO, weights, ("open_clip_config.json",), _USE)
            architecture, pretrained = open_clip_folder(place), None
        else:
            architecture, pretrained = ARCHITECTURE, weights
            if not place.is_file() and weights not in (tags := open_clip.list_pretrained_tags_by_model(ARCHITECTURE)):
                raise FastgenError(
                    f"{_WHO}: {weights!r} is no file, no folder and none of open_clip's weights of {ARCHITECTURE}: "
                    f"{', '.join(tags)}"
                )
        with explained(_WHO, weights, _USE):
            try:
                model, _, preprocess = open_clip.create_model_and_transforms(
                    architecture, pretrained, force_quick_gelu=True
                )
                tokenizer = open_clip.get_tokenizer(architecture)
            except RuntimeError as error:  # open_clip wraps what the Hub says
                if pretrained is None or place.is_file():
                    raise
                raise FastgenError(
                    f"{_WHO}: {ARCHITECTURE}/{weights} is not in the local cache and cannot be downloaded "
                    f"({str(error).splitlines()[0][:200]}): {_USE}"
                ) from error
        return cls(model, preprocess, tokenizer, weights=weights, device=device)

    def fingerprint(self) -> str:
        """sha256 of the weights."""
        from fastgen.evaluation.geneval.shapes_checker import fingerprint

        return fingerprint(self.model)

    @torch.no_grad()
    def classify(
        self, image: np.ndarray, detections: Detections, class_name: str, indices: Sequence[int]
    ) -> list[str]:
        """Colour name of each detection in `indices` of `image` (uint8 [H, W, 3])."""
        if not indices:
            return []
        crops = [self.preprocess(cut_out(image, detections, index)) for index in indices]
        with torch.autocast("cuda", torch.float16, enabled=self.device.type == "cuda"):
            features = functional.normalize(self.model.encode_image(torch.stack(crops).to(self.device)), dim=-1)
            logits = 100.0 * features @ self._head(class_name)
        return [COLORS[best] for best in logits.argmax(dim=1).tolist()]

    def _head(self, class_name: str) -> Tensor:
        """Text embeddings [d, colours] for a class."""
        if class_name not in self._heads:
            columns = []
            for color in COLORS:
                texts = [template.format(color=color, name=class_name) for template in TEMPLATES]
                embedded = functional.normalize(self.model.encode_text(self.tokenizer(texts).to(self.device)), dim=-1)
                columns.append(functional.normalize(embedded.mean(dim=0), dim=-1))
            self._heads[class_name] = torch.stack(columns, dim=1)
        return self._heads[class_name]


def cut_out(image: np.ndarray, detections: Detections, index: int) -> Image.Image:
    """One object on grey (#999999), cropped to its box."""
    box = [int(edge) for edge in np.rint(detections.boxes[index])]
    pixels = image
    if detections.masks is not None:
        pixels = np.where(detections.masks[index][..., None], image, np.array(BACKGROUND, np.uint8))
    return Image.fromarray(pixels).crop((box[0], box[1], box[2], box[3]))


def require_quick_gelu(model: nn.Module, what: str) -> None:
    """FastgenError when `model` has a GELU of another kind, or no QuickGELU at all."""
    kinds = {type(module).__name__ for module in model.modules()}
    if "QuickGELU" not in kinds or "GELU" in kinds:
        raise FastgenError(
            f"{_WHO}: {what} does not use QuickGELU, with which the official weights were trained; its colours "
            "would differ (open_clip: force_quick_gelu=True)"
        )
