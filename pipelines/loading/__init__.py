"""From a name, a folder or a Hub id to a pipeline, with every check that can be made before weights are read.

Names load their module when they are first used: to look at a checkpoint needs neither torch nor diffusers.
"""

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
