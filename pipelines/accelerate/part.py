"""The interface of a part of `accelerate`. Off restores the pipeline bit for bit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import nn

from fastgen.contracts import Loss
from fastgen.pipelines.quantization import layer_pattern

__all__ = ["Part", "Undo", "added_attributes", "block_layers", "denoising_network"]

Undo = Callable[[], None]


#: Names of the network that is called at every step.
DENOISERS = ("transformer", "unet", "prior")


def denoising_network(pipe: Any) -> Any:
    """The network that is called at every step, or None."""
    found = [getattr(pipe, name, None) for name in DENOISERS]
    return next((each for each in found if isinstance(each, nn.Module)), None)


def added_attributes(model: nn.Module) -> Undo:
    """Removes, when called, what was added to the attributes of the model's modules since now.

    Libraries that hook into models leave empty registries and bound methods behind, and children in another order, by
    which diffusers' caches use to find the first block.
    """
    before = [(module, set(vars(module)), list(module._modules)) for module in model.modules()]

    def remove() -> None:
        for module, names, children in before:
            for name in set(vars(module)) - names:
                delattr(module, name)
            if list(module._modules) != children:
                now = dict(module._modules)
                module._modules.clear()
                module._modules.update({name: now.pop(name) for name in children if name in now} | now)

    return remove


def block_layers(model: Any) -> list[nn.Linear]:
    """Linear layers inside a list of blocks, those that carry LoRA included, with plain weights in memory.

    Those that diffusers names as sensitive are left out.
    """
    chosen = layer_pattern(model)
    return [
        layer
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear
        and chosen.fullmatch(name)
        and type(layer.weight) is nn.Parameter
        and type(layer.weight.data) is torch.Tensor
        and layer.weight.is_floating_point()
        and layer.weight.device.type != "meta"
    ]


class Part(ABC):
    """One thing that makes a pipeline faster. Its fields are its settings."""

    name: ClassVar[str]
    loss: ClassVar[Loss]

    @abstractmethod
    def why_not(self, pipe: Any) -> str | None:
        """Why it cannot be used here, in a few words; None if it can. Changes nothing."""

    @abstractmethod
    def enable(self, pipe: Any) -> Undo:
        """Turn it on; returns what turns it off again."""

    @property
    def settings(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
