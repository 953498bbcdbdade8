"""Verifiers by name. The networks' libraries are imported when one is loaded."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.errors import FastgenError
from fastgen.io import read_object

if TYPE_CHECKING:
    from fastgen.evaluation.verifiers.base import Verifier

__all__ = ["VERIFIERS", "load_verifier", "verifier_class"]

#: Name -> module of this package and class in it; `Class.load(weights, device=…, dtype=…)` makes one.
VERIFIERS = {
    "aesthetic": "clip:Aesthetic",
    "clip-score": "clip:CLIPScore",
    "hps-v2.1": "hps:HPS",
    "image-reward": "image_reward:ImageReward",
    "pick-score": "clip:PickScore",
    "qwen-vl": "yes_no:YesNo",
    "shapes-verifier": "shapes_verifier:ShapesVerifier",
    "vqa-score": "vqa:VQAScore",
}

# Which verifier a folder without a name is for, by the model_type in its config.json.
_OF_MODEL_TYPE = {
    "clip": "clip-score",
    "clip_t5": "vqa-score",
    "qwen2_5_vl": "qwen-vl",
    "qwen3_vl": "qwen-vl",
    "qwen3_vl_moe": "qwen-vl",
}
# Our own networks, which are no transformers, name their class.
_OF_CLASS = {"ShapesVerifier": "shapes-verifier"}


def load_verifier(
    name_or_path: str | os.PathLike[str], device: str = "cpu", dtype: str = "auto", **options: Any
) -> Verifier:
    """A verifier, ready to score.

    Args:
        name_or_path: a name from `VERIFIERS`, which takes the published weights; NAME:HUB_ID or NAME:FOLDER for other
            ones; or a folder whose config.json names its class.
        device: "cpu", "cuda", "cuda:1", "mps" …
        dtype: of the weights: "float32", "bfloat16", "float16" or "auto": float32 for the cosines and the aesthetic
            score; for the others float32 on the CPU and the GPU's best half type there.
        options: `batch_size` and `cache_size` of the verifiers with a network.

    Raises:
        FastgenError: no such name, or weights, a package or the device is not available; one line.
    """
    kind, weights = verifier_class(name_or_path)
    return kind.load(weights, device=device, dtype=dtype, **options)


def verifier_class(name_or_path: str | os.PathLike[str]) -> tuple[Any, str | None]:
    """The class that `load_verifier` makes one of, and its weights where they are not the published ones.

    Raises:
        FastgenError: no such name.
    """
    text = os.fspath(name_or_path)
    name, _, weights = (_name_of(Path(text)), ":", text) if os.path.isdir(text) else text.partition(":")
    if name not in VERIFIERS:
        raise FastgenError(f"verifier: {name!r} is unknown, needs one of {', '.join(VERIFIERS)}, or a folder")
    if ":" in text and not weights:
        raise FastgenError(f"verifier: {text!r} names no weights after the colon")
    module, _, attribute = VERIFIERS[name].partition(":")
    module = f"{__package__}.{module}"
    if importlib.util.find_spec(module) is None:
        raise FastgenError(f"verifier: {name!r} does not come with this version of fastgen")
    return getattr(importlib.import_module(module), attribute), weights or None


def _name_of(folder: Path) -> str:
    """The verifier that the weights in a folder are for."""
    config = folder / "config.json"
    found = read_object(config) if config.is_file() else {}
    name = _OF_MODEL_TYPE.get(found.get("model_type", "")) or _OF_CLASS.get(found.get("_class_name", ""))
    if name is None:
        raise FastgenError(
            f"verifier: {folder} does not say which verifier its weights are for; write NAME:{folder} with one of "
            f"{', '.join(VERIFIERS)}"
        )
    return name
