"""fastgen: image generation with diffusers and transformers models, faster at known quality.

`import fastgen` is lazy: torch and diffusers load when a name that needs them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen import accounting, contracts, errors
    from fastgen.accounting import Stats, account
    from fastgen.errors import FastgenError
    from fastgen.models.dc_dit import DCDiTTransformer2DModel
    from fastgen.models.dc_z_image import DCZImageTransformer2DModel
    from fastgen.models.upcycle import upcycle
    from fastgen.pipelines.accelerate import Plan, accelerate, accelerated, restore
    from fastgen.pipelines.dc_dit import DCDiTPipeline
    from fastgen.pipelines.dc_z_image import DCZImagePipeline
    from fastgen.pipelines.elastic import disable_dc, enable_dc
    from fastgen.pipelines.generation import GeneratedImage, generate_images
    from fastgen.pipelines.kernels import disable_kernels, enable_kernels
    from fastgen.pipelines.loading import load_pipeline
    from fastgen.pipelines.noise_search import NoiseSearchPipeline
    from fastgen.pipelines.speculative import SpeculativeImagePipeline
    from fastgen.pipelines.summary import summary

__version__ = "0.1.0"

# Public name -> module that defines it. Modules themselves are public by their last part.
_EXPORTS = {
    "DCDiTPipeline": "fastgen.pipelines.dc_dit",
    "DCDiTTransformer2DModel": "fastgen.models.dc_dit",
    "DCZImagePipeline": "fastgen.pipelines.dc_z_image",
    "DCZImageTransformer2DModel": "fastgen.models.dc_z_image",
    "FastgenError": "fastgen.errors",
    "GeneratedImage": "fastgen.pipelines.generation",
    "NoiseSearchPipeline": "fastgen.pipelines.noise_search",
    "Plan": "fastgen.pipelines.accelerate",
    "SpeculativeImagePipeline": "fastgen.pipelines.speculative",
    "Stats": "fastgen.accounting",
    "accelerate": "fastgen.pipelines.accelerate",
    "accelerated": "fastgen.pipelines.accelerate",
    "account": "fastgen.accounting",
    "disable_dc": "fastgen.pipelines.elastic",
    "disable_kernels": "fastgen.pipelines.kernels",
    "enable_dc": "fastgen.pipelines.elastic",
    "enable_kernels": "fastgen.pipelines.kernels",
    "generate_images": "fastgen.pipelines.generation",
    "load_pipeline": "fastgen.pipelines.loading",
    "restore": "fastgen.pipelines.accelerate",
    "summary": "fastgen.pipelines.summary",
    "upcycle": "fastgen.models.upcycle",
}
_MODULES = ("accounting", "contracts", "data", "drafters", "errors", "evaluation", "kernels", "models", "pipelines")

__all__ = [
    "DCDiTPipeline",
    "DCDiTTransformer2DModel",
    "DCZImagePipeline",
    "DCZImageTransformer2DModel",
    "FastgenError",
    "GeneratedImage",
    "NoiseSearchPipeline",
    "Plan",
    "SpeculativeImagePipeline",
    "Stats",
    "__version__",
    "accelerate",
    "accelerated",
    "account",
    "accounting",
    "contracts",
    "disable_dc",
    "disable_kernels",
    "enable_dc",
    "enable_kernels",
    "errors",
    "generate_images",
    "info",
    "load_pipeline",
    "restore",
    "summary",
    "upcycle",
]


def info() -> dict[str, Any]:
    """Versions, devices, fast paths and embedded models of this installation, as `fastgen info --json` shows them."""
    return dict(importlib.import_module("fastgen.cli.info").collect())


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"fastgen.{name}")
    else:
        raise AttributeError(f"module 'fastgen' has no attribute {name!r}")
    globals()[name] = value  # the next access is a plain attribute look-up
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
