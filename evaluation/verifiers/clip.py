"""Verifiers on transformers' CLIP: CLIPScore, PickScore and the LAION aesthetic predictor.

Their scores of good pictures differ in the third digit, so "auto" means float32 here on every device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from fastgen.errors import FastgenError
from fastgen.evaluation.verifiers.base import ModelVerifier
from fastgen.evaluation.verifiers.hub import check_loaded, explained, find_file, part, place, read_tensors
from fastgen.evaluation.verifiers.pixels import processed
from fastgen.pretrained import load_pretrained

__all__ = ["Aesthetic", "CLIPScore", "PickScore", "aesthetic_head"]

CLIP_L14 = "openai/clip-vit-large-patch14"
CLIP_FOLDER = "clip"
CLIP_H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

Own = TypeVar("Own", bound="_Cosine")


def _load_clip(verifier: str, weights: str, device: torch.device, dtype: torch.dtype, use: str = "") -> CLIPModel:
    find_file(verifier, weights, ("config.json",), use)
    with explained(verifier, weights, use):
        model, info = load_pretrained(CLIPModel, weights, dtype=dtype, output_loading_info=True)
        check_loaded(verifier, weights, info)
        return model.to(device)


def _load_image_processor(verifier: str, weights: str, use: str = "") -> Any:
    find_file(verifier, weights, ("preprocessor_config.json",), use)
    with explained(verifier, weights, use):
        return load_pretrained(AutoImageProcessor, weights)


def _image_embeddings(model: CLIPModel, processor: Any, images: Tensor) -> Tensor:
    """Embeddings of length 1, float32 [k, d]."""
    pixels = processed(processor, images)["pixel_values"].to(model.device, model.dtype)
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    return nn.functional.normalize(model.visual_projection(pooled).float(), dim=-1)


class _Cosine(ModelVerifier):
    """Cosine of the CLIP embeddings of picture and prompt.

    Args:
        model: the CLIP model.
        image_processor, tokenizer: of transformers, as the model was trained with.
        kwargs: `batch_size` and `cache_size` of `ModelVerifier`.
    """

    range = (-1.0, 1.0)
    hub_id: str
    processor_id: str

    def __init__(self, model: CLIPModel, image_processor: Any, tokenizer: Any, **kwargs: int) -> None:
        super().__init__(model, **kwargs)
        self.clip = model
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls: type[Own], weights: str | None = None, *, device: str = "cpu", dtype: str = "auto", **kwargs: int
    ) -> Own:
        """From a Hub id or a folder; the published weights, and a folder without tokenizer and image processor, take
        those of `processor_id`.

        Raises:
            FastgenError: something is missing or broken; the line names it and how to get it.
        """
        weights = weights or cls.hub_id
        where, kind = place(device, dtype, "float32")
        bare = Path(weights).is_dir() and not (Path(weights) / "preprocessor_config.json").is_file()
        around = cls.processor_id if bare or weights == cls.hub_id else weights
        use = (
            "" if around == weights else f"copy its tokenizer and preprocessor files next to the weights of {weights}"
        )
        processor = _load_image_processor(cls.name, around, use)
        with explained(cls.name, around, use):
            tokenizer = load_pretrained(AutoTokenizer, around)
        made = cls(_load_clip(cls.name, weights, where, kind), processor, tokenizer, **kwargs)
        made.weights = weights
        return made

    def _encode(self, prompts: list[str]) -> Sequence[Tensor]:
        longest = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        pooled = self.clip.text_model(**tokens.to(self.device)).pooler_output
        return list(nn.functional.normalize(self.clip.text_projection(pooled).float(), dim=-1))

    def _score_batch(self, images: Tensor, sides: list[Any]) -> Tensor:
        return (_image_embeddings(self.clip, self.image_processor, images) * torch.stack(sides)).sum(-1)


class CLIPScore(_Cosine):
    """max(100 * cosine, 0) of CLIP ViT-L/14, as torchmetrics has it; from 0 to 100."""

    name = "clip-score"
    range = (0.0, 100.0)
    hub_id = processor_id = CLIP_L14

    def _score_batch(self, images: Tensor, sides: list[Any]) -> Tensor:
        return (100 * super()._score_batch(images, sides)).clamp(min=0)


class PickScore(_Cosine):
    """Cosine of a CLIP ViT-H/14 tuned on human choices; from -1 to 1, in practice about 0.15 to 0.25.

    The logit scale of the published score (about 100) is left out, as searches do.
    """

    name = "pick-score"
    hub_id = "yuvalkirstain/PickScore_v1"
    processor_id = CLIP_H14


def aesthetic_head(tensors: Mapping[str, Tensor]) -> nn.Sequential:
    """The linear layers of a state dict in the order of their numbers; there is nothing between them at inference.

    Raises:
        ValueError: they do not fit one another, or do not end in one number.
    """
    names = [name.removesuffix(".weight") for name, tensor in tensors.items() if name.endswith(".weight")]
    layers = nn.Sequential()
    for name in sorted(names, key=lambda name: int(name.rsplit(".", 1)[-1])):
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        if layers and layers[-1].out_features != weight.shape[1]:
            raise ValueError(f"{name}: takes {weight.shape[1]} values, the layer before gives another number")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if not layers or layers[-1].out_features != 1:
        raise ValueError("the layers do not end in one score")
    return layers


class Aesthetic(ModelVerifier):
    """LAION's aesthetic score, about 1 to 10 without bounds: linear layers on the embedding of CLIP ViT-L/14.

    The prompt is ignored, so a search with only this score drifts away from the prompt.

    Args:
        model: the CLIP model.
        head: from the embedding to one number, as `aesthetic_head` makes it.
        image_processor: of the CLIP model.
        kwargs: `batch_size` and `cache_size` of `ModelVerifier`.
    """

    name = "aesthetic"
    hub_id = "trl-lib/ddpo-aesthetic-predictor"
    files = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.safetensors")

    def __init__(self, model: CLIPModel, head: nn.Sequential, image_processor: Any, **kwargs: int) -> None:
        super().__init__(nn.ModuleDict({"clip": model, "head": head}), **kwargs)
        self.clip, self.head = model, head
        self.image_processor = image_processor

    @classmethod
    def load(cls, weights: str | None = None, *, device: str = "cpu", dtype: str = "auto", **kwargs: int) -> Aesthetic:
        """From a file of the linear layers, or a folder or Hub id with one; the CLIP model is in the folder's
        `clip/`, else it is openai/clip-vit-large-patch14.

        Raises:
            FastgenError: something is missing or broken; the line names it and how to get it.
        """
        weights = weights or cls.hub_id
        where, kind = place(device, dtype, "float32")
        file = find_file(cls.name, weights, cls.files)
        with explained(cls.name, file):
            head = aesthetic_head(read_tensors(file))
        source = part(weights, CLIP_FOLDER, CLIP_L14)
        use = f"copy it to {CLIP_FOLDER}/ next to {file.name}"
        processor = _load_image_processor(cls.name, source, use)
        clip = _load_clip(cls.name, source, where, kind, use)
        if head[0].in_features != clip.config.projection_dim:
            raise FastgenError(
                f"verifier {cls.name}: {file} takes embeddings of {head[0].in_features} numbers, "
                f"{source} gives {clip.config.projection_dim}"
            )
        made = cls(clip, head.to(where), processor, **kwargs)  # the head stays float32: it costs nothing
        made.weights = weights
        return made

    def _score_batch(self, images: Tensor, sides: list[Any]) -> Tensor:
        found: Tensor = self.head(_image_embeddings(self.clip, self.image_processor, images))
        return found.squeeze(-1)
