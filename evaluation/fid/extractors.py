"""The networks whose features are compared. Each describes everything that its features depend on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.errors import FastgenError
from fastgen.evaluation.fid.inception import POOL, SIDE, SPATIAL, InceptionV3, load_inception
from fastgen.evaluation.fid.protocols import Protocol
from fastgen.evaluation.fid.resize_modes import RESIZE
from fastgen.evaluation.geneval.mask2former import full_precision
from fastgen.evaluation.geneval.shapes_checker import ShapesModel, fingerprint, load_detector, model_batch
from fastgen.pretrained import load_pretrained

__all__ = [
    "CLIPEmbeddings",
    "CLIPScores",
    "DINOv2",
    "Extractor",
    "Inception",
    "ShapesNetwork",
    "load_extractor",
]

CMMD_CLIP = "openai/clip-vit-large-patch14-336"
SCORE_CLIP = "openai/clip-vit-large-patch14"
DINOV2 = "facebook/dinov2-large"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Extractor(ABC):
    """From images to features.

    Attributes:
        name: of the network, as results print it.
        taps: its outputs: tap -> width.
        fingerprint: sha256 of the weights.
        resize: named mode of the resize before the network.
        label: printed in front, by default the resize mode; a protocol's own name where there is one.
        dtype: of the computation.
        device: where it runs.
        needs_prompts: `compute` needs the images' prompts.
    """

    name: str
    taps: Mapping[str, int]
    fingerprint: str
    resize: str
    label: str
    dtype = "float32"
    device: torch.device
    needs_prompts = False

    @abstractmethod
    def prepare(self, image: np.ndarray) -> Tensor:
        """One image, uint8 [H, W, 3], as the network's input on the CPU; called from several threads."""

    @abstractmethod
    def compute(self, batch: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prepared images, stacked, on the device -> tap -> float32 [n, width]."""

    def describe(self) -> dict[str, Any]:
        """What the features depend on, JSON-ready; part of every result and of the keys of kept features."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "resize": self.resize,
            "dtype": self.dtype,
            "protocol": self.label,
        }

    @torch.no_grad()
    def __call__(self, batch: Tensor, prompts: Sequence[str] = ()) -> dict[str, Tensor]:
        """`compute` in full single precision, independent of the settings of the process."""
        with full_precision():
            return self.compute(batch.to(self.device), prompts)


class Inception(Extractor):
    """The FID network under a protocol.

    Args:
        protocol: resize and pixel range.
        model: the network; loaded by `load_inception` when None.
    """

    name = "inception-tf"
    taps = {"pool": POOL, "spatial": SPATIAL}

    def __init__(
        self, protocol: Protocol, model: InceptionV3 | None = None, *, device: str | torch.device = "cpu"
    ) -> None:
        self.model = (load_inception() if model is None else model).to(device).eval()
        self.fingerprint = fingerprint(self.model)
        self.protocol, self.resize, self.label = protocol, protocol.resize, protocol.label
        self.device = torch.device(device)
        self._resize = RESIZE[protocol.resize]

    def prepare(self, image: np.ndarray) -> Tensor:
        return self._resize(image, SIDE)

    def compute(self, batch: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        pool, spatial = self.model((batch - self.protocol.shift) / self.protocol.scale)
        return {"pool": pool, "spatial": spatial}

    def logits(self, pool: Tensor) -> Tensor:
        """Class logits without bias, computed where the network is, [n, 1008]."""
        with torch.no_grad():
            return torch.cat([self.model.logits(part.to(self.device)).to(pool.device) for part in pool.split(4096)])


class ShapesNetwork(Extractor):
    """The penultimate features of the embedded ShapesWorld detector, resized to 64 x 64 with antialiasing."""

    resize = label = "bilinear-antialias-64"

    def __init__(self, model: ShapesModel | None = None, *, device: str | torch.device = "cpu") -> None:
        self.model = load_detector(device=device) if model is None else model
        self.fingerprint = fingerprint(self.model)
        self.device = torch.device(device)
        width = self.compute(torch.zeros(1, 64, 64, 3, dtype=torch.uint8, device=device), ())["pool"].shape[1]
        self.taps = {"pool": int(width)}
        self.name = f"shapes-detector-{width}"

    def prepare(self, image: np.ndarray) -> Tensor:
        return model_batch([image])[0]

    @torch.no_grad()
    def compute(self, batch: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"pool": self.model.features(batch).float()}


class _Transformers(Extractor):
    """A vision model of transformers."""

    mean_std = _IMAGENET
    side: int

    def _setup(self, model: Any, weights: str, resize: str, device: str | torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.name = Path(weights).name
        self.fingerprint = fingerprint(self.model)
        self.resize = self.label = resize
        self.device = torch.device(device)
        self._resize = RESIZE[resize]
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in self.mean_std)

    def prepare(self, image: np.ndarray) -> Tensor:
        return (self._resize(image, self.side) / 255 - self._mean) / self._std


class CLIPEmbeddings(_Transformers):
    """Projected CLIP embeddings of length 1, as CMMD takes them: the whole image resized, no centre crop.

    Args:
        weights: folder or Hub id.

    Raises:
        FastgenError: the weights are missing or broken; the line says how to get them.
    """

    mean_std = _CLIP

    def __init__(self, weights: str | None = None, *, device: str | torch.device = "cpu") -> None:
        from transformers import CLIPModel

        weights = weights or CMMD_CLIP
        # The whole model: only its configuration has the width of the projection.
        model = _load("cmmd", CLIPModel, weights)
        self.side = int(model.config.vision_config.image_size)
        self.taps = {"pool": int(model.config.projection_dim)}
        parts = {"vision_model": model.vision_model, "visual_projection": model.visual_projection}
        self._setup(torch.nn.ModuleDict(parts), weights, "torch-bicubic", device)

    def compute(self, batch: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        pooled = self.model["vision_model"](pixel_values=batch).pooler_output
        return {"pool": torch.nn.functional.normalize(self.model["visual_projection"](pooled).float(), dim=-1)}


class DINOv2(_Transformers):
    """The class token of DINOv2 after the last norm, images of 224 x 224 (Stein et al. 2023, arXiv:2306.04675).

    Args:
        weights: folder or Hub id.

    Raises:
        FastgenError: the weights are missing or broken; the line says how to get them.
    """

    side = 224

    def __init__(self, weights: str | None = None, *, device: str | torch.device = "cpu") -> None:
        from transformers import Dinov2Model

        weights = weights or DINOV2
        model = _load("dinov2", Dinov2Model, weights)
        self.taps = {"pool": int(model.config.hidden_size)}
        self._setup(model, weights, "pil-bicubic", device)

    def compute(self, batch: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"pool": self.model(pixel_values=batch).pooler_output.float()}


class CLIPScores(Extractor):
    """CLIPScore of each image with its prompt, max(100 cos, 0), by the verifier of that name."""

    taps = {"pool": 1}
    resize = label = "clip-processor"
    needs_prompts = True

    def __init__(self, weights: str | None = None, *, device: str | torch.device = "cpu") -> None:
        from fastgen.evaluation.verifiers.clip import CLIPScore

        weights = weights or SCORE_CLIP
        self.verifier = CLIPScore.load(weights, device=str(device))
        self.name = Path(weights).name
        self.fingerprint = fingerprint(self.verifier.clip)
        self.device = torch.device(device)

    def prepare(self, image: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def compute(self, batch: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"pool": self.verifier.score(batch, list(prompts)).float()[:, None]}


def load_extractor(
    name: str, protocol: Protocol, *, weights: str | None = None, device: str | torch.device = "cpu"
) -> Extractor:
    """The extractor `name`: inception, shapes, dinov2, cmmd or clip-score.

    Args:
        protocol: of Inception.
        weights: file, folder or Hub id; None takes the published ones from the local caches or the Hub.

    Raises:
        FastgenError: no such extractor, or its weights are missing or broken.
    """
    if name == "inception":
        return Inception(protocol, load_inception(weights), device=device)
    if name == "shapes":
        return ShapesNetwork(load_detector(weights, device=device), device=device)
    kinds: dict[str, Any] = {"dinov2": DINOv2, "cmmd": CLIPEmbeddings, "clip-score": CLIPScores}
    if name not in kinds:
        raise FastgenError(f"extractor: {name!r} is unknown, needs one of inception, shapes, {', '.join(kinds)}")
    return kinds[name](weights, device=device)


def _load(extractor: str, network: Any, weights: str) -> Any:
    from fastgen.evaluation.verifiers.hub import check_loaded, explained, find_file

    use = f"name its folder with --weights {extractor}=FOLDER"
    find_file(extractor, weights, ("config.json",), use)
    with explained(extractor, weights, use):
        model, info = load_pretrained(network, weights, output_loading_info=True)
        check_loaded(extractor, weights, info)
    return model
