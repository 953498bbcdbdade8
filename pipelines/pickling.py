"""Pipelines that have drawn can be pickled, for another process too.

transformers leaves functions in models, which cannot be pickled, and notes once per process, when a model is built,
which of its layers record hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing

__all__ = ["PickledMixin", "restore", "without_recorders"]

_INSTALLED = "_output_capturing_hooks_installed"


class PickledMixin:
    """A pipeline that can be pickled and copied before and after it has drawn."""

    def __getstate__(self) -> dict[str, Any]:
        return without_recorders(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        restore(self, state)


def restore(pipe: Any, state: Mapping[str, Any]) -> None:
    """Give a pipeline its state back, and let transformers know of models that were not built in this process."""
    vars(pipe).update(state)
    registry: Any = getattr(output_capturing, "_CAN_RECORD_REGISTRY", None)
    if registry is None:  # other versions of transformers ask the model itself
        return
    for part in (part for value in state.values() if isinstance(value, nn.Module) for part in value.modules()):
        if isinstance(part, PreTrainedModel):
            registry[str(type(part)) if type(registry) is dict else part] = part._can_record_outputs


def without_recorders(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state whose models are shallow copies without the hooks by which transformers records hidden states. It
    installs them again when a model runs."""
    made: dict[int, nn.Module] = {}
    return {name: _twin(value, made) if isinstance(value, nn.Module) else value for name, value in state.items()}


def _twin(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """The module itself where there is nothing to leave out, else a shallow copy with the same parameters."""
    if id(module) in made:
        return made[id(module)]
    parts = {name: part if part is None else _twin(part, made) for name, part in module._modules.items()}
    kept = type(module._forward_hooks)(
        (key, hook) for key, hook in module._forward_hooks.items() if not _records(hook)
    )
    same = len(kept) == len(module._forward_hooks) and all(
        parts[name] is part for name, part in module._modules.items()
    )
    twin = module
    if not same or vars(module).get(_INSTALLED):
        twin = object.__new__(type(module))
        vars(twin).update(vars(module), _modules=parts, _forward_hooks=kept)
        vars(twin).pop(_INSTALLED, None)
    made[id(module)] = twin
    return twin


def _records(hook: Any) -> bool:
    return bool(getattr(hook, "__module__", None) == "transformers.utils.output_capturing")
