"""Subclasses made on the fly: of a scheduler that reports to an entry, of a pipeline that knows its device."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastgen.pipelines.search.denoisers.entry import Entry

__all__ = ["Stepped", "entered_class", "probe_of"]


class Stepped(dict[str, Tensor]):
    """The output of a scheduler's step, as an object and as a dict."""

    def __init__(self, prev_sample: Tensor, pred_original_sample: Tensor) -> None:
        super().__init__(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
        self.prev_sample, self.pred_original_sample = prev_sample, pred_original_sample


def probe_of(scheduler: Any, entry: Entry) -> Any:
    """A copy of a scheduler whose schedule and steps are the entry's."""
    probe = copy.deepcopy(scheduler)
    kind: Any = type(scheduler)
    probe.__class__ = _probe_class(kind)
    probe._entry = _Uncopied(entry)
    return probe


class _Uncopied:
    """Holds an object that copies of its owner share."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __deepcopy__(self, memo: dict[int, Any]) -> _Uncopied:
        return self


@functools.cache
def _probe_class(kind: type) -> type:
    """A subclass with the scheduler's own name and signatures, which pipelines inspect."""
    base: Any = kind

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        base.set_timesteps(self, *args, **kwargs)
        self._entry.held._scheduled(self)

    # Pipelines inspect it at every call; what is set is not looked for.
    set_timesteps.__signature__ = inspect.signature(base.set_timesteps)  # type: ignore[attr-defined]

    @functools.wraps(base.step)
    def step(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        return self._entry.held._stepped(self, model_output, timestep, sample, bool(kwargs.get("return_dict", True)))

    return type(kind.__name__, (kind,), {"set_timesteps": set_timesteps, "step": step, "__module__": kind.__module__})


@functools.cache
def entered_class(kind: Any, interruptible: bool) -> type:
    """A subclass of a pipeline's class, of the same name, that knows its device, and, where its loop asks, which steps
    to skip."""

    def device(self: Any) -> torch.device:
        return self._entered_device

    def interrupt(self: Any) -> bool:
        visit = self._entered.visit
        visit.skipping -= 1
        return bool(visit.skipping >= 0 or kind.interrupt.fget(self))

    own: dict[str, Any] = {"_execution_device": property(device), "__module__": kind.__module__}
    return type(kind.__name__, (kind,), own | ({"interrupt": property(interrupt)} if interruptible else {}))
