"""From a name to a pipeline. Names load their module when first used: looking at a checkpoint needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen.pipelines.loading.loader import load_checkpoint, load_pipeline, resolve_device

__all__ = ["load_checkpoint", "load_pipeline", "resolve_device"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastgen.pipelines.loading import loader

    return getattr(loader, name)
