"""What a part of `accelerate` is. Each is off, or on; off is bit for bit what was there before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

from torch import nn

from fastgen.contracts import Loss

__all__ = ["Part", "Undo", "added_attributes", "denoising_network"]

Undo = Callable[[], None]


def denoising_network(pipe: Any) -> Any:
    """The network that is called at every step, or None."""
    found = [getattr(pipe, name, None) for name in ("transformer", "unet", "prior")]
    return next((each for each in found if isinstance(each, nn.Module)), None)


def added_attributes(model: nn.Module) -> Undo:
    """Removes, when called, what was added to the attributes of the model's modules since now.

    Libraries that hook into models leave empty registries and bound methods behind.
    """
    before = [(module, set(vars(module))) for module in model.modules()]

    def remove() -> None:
        for module, names in before:
            for name in set(vars(module)) - names:
                delattr(module, name)

    return remove


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
