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
    from fastgen.pipelines.loading import GeneratedImage, generate_images, load_pipeline

__version__ = "0.1.0"

# Public name -> module that defines it. Modules themselves are public by their last part.
_EXPORTS = {
    "FastgenError": "fastgen.errors",
    "GeneratedImage": "fastgen.pipelines.loading",
    "Stats": "fastgen.accounting",
    "account": "fastgen.accounting",
    "generate_images": "fastgen.pipelines.loading",
    "load_pipeline": "fastgen.pipelines.loading",
}
_MODULES = ("accounting", "contracts", "data", "drafters", "errors", "evaluation", "kernels", "models", "pipelines")

__all__ = [
    "FastgenError",
    "GeneratedImage",
    "Stats",
    "__version__",
    "account",
    "accounting",
    "contracts",
    "errors",
    "generate_images",
    "load_pipeline",
]


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
