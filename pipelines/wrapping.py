"""A pipeline around another one: a `DiffusionPipeline` with the parts and settings of the one inside."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

__all__ = ["WrappingPipeline"]


class WrappingPipeline(DiffusionPipeline):
    """Everything but the call is that of `pipe`: `to`, `components`, offload, LoRA, `save_pretrained` ...

    Args:
        pipe: the pipeline inside.
    """

    pipe: Any

    # What is set on the wrapper stays there: diffusers would look for it in the config.
    __setattr__ = object.__setattr__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "pipe":
            raise AttributeError(name)
        return getattr(self.pipe, name)


def _forwarded(name: str) -> property:
    return property(lambda self: getattr(self.pipe, name))


for _name in dir(DiffusionPipeline):
    _found = inspect.getattr_static(DiffusionPipeline, _name)
    if not _name.startswith("__") and not isinstance(_found, classmethod | staticmethod):
        setattr(WrappingPipeline, _name, _forwarded(_name))
