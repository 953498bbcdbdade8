"""Replacements of a pipeline's parts while its call runs: a model that is skipped, a VAE that encodes once."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastgen.accounting import note_path

if TYPE_CHECKING:
    from fastgen.pipelines.search.denoisers.entry import Entry

__all__ = ["DENOISERS", "Encoding", "NoBar", "Passing", "branching", "fresh", "shape_of"]

#: Networks that denoise, by the names that pipelines have for them.
DENOISERS = ("transformer", "unet", "prior")


class Passing:
    """Stands for a model in the copied pipeline: counts rows, and does not run it in a step that is passed over."""

    def __init__(self, model: Any, entry: Entry, name: str) -> None:
        self._model, self._entry, self._name = model, entry, name
        self.dtype = getattr(model, "dtype", None)  # found by a walk over all parameters

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        visit, outputs = self._entry.visit, self._entry.outputs
        sample = next((kwargs[name] for name in ("hidden_states", "sample", "x") if name in kwargs), None)
        sample = args[0] if sample is None and args else sample
        rows = len(sample) if isinstance(sample, Tensor | list | tuple) else 0
        place = (self._name, rows)
        if (visit.passing or visit.leave == "latents") and place in outputs:
            return outputs[place]
        if self._name in DENOISERS:
            visit.rows += rows
        outputs[place] = self._model(*args, **kwargs)
        return outputs[place]


class Encoding:
    """Stands for the VAE: encodes what it is given once, and draws from what it says once."""

    def __init__(self, vae: Any, entry: Entry) -> None:
        self._vae = vae
        self.dtype = getattr(vae, "dtype", None)
        self.encode = entry.remembering(
            "vae.encode", lambda *args, **kwargs: _drawn(vae.encode(*args, **kwargs), entry)
        )

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._vae)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)


def _drawn(encoded: Any, entry: Entry) -> Any:
    if hasattr(encoded, "latent_dist"):
        encoded.latent_dist = _Drawn(encoded.latent_dist, entry)
    return encoded


class _Drawn:
    """A distribution of latents from which one sample is drawn."""

    def __init__(self, law: Any, entry: Entry) -> None:
        self._law, self._entry, self._found = law, entry, None

    def sample(self, generator: torch.Generator | None = None) -> Any:
        self._entry.batches = False  # samples of a batch would each draw their own
        if self._found is None:
            with torch.random.fork_rng(devices=[]):  # some pipelines draw without a generator
                self._found = self._law.sample(generator)
        return self._found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._law, name)


class NoBar:
    """A progress bar that shows nothing, as pipelines use one."""

    def __init__(self, iterable: Iterable[Any] = (), *_: Any, **__: Any) -> None:
        self._iterable = iterable

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def update(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    close = set_description = set_postfix = update


def branching(guider: Any) -> Any:
    """A copy of a guider, without the momentum that it carries from step to step."""
    guider = copy.deepcopy(guider)
    if getattr(guider, "adaptive_projected_guidance_momentum", None) is not None:
        guider.adaptive_projected_guidance_momentum = guider.momentum_buffer = None
        reason = "a search branches, and the momentum of guidance is a history, which cannot"
        note_path("guider", f"{type(guider).__name__} without momentum", reason)
    return guider


def shape_of(value: Any) -> Any:
    """Identifies a request for a condition within a search, whose arguments never change: numbers and
    texts by value, tensors and pictures by their shape."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return value[0], shape_of(value[1])
    if isinstance(value, Tensor | np.ndarray):
        return tuple(value.shape)
    if isinstance(value, list | tuple):
        return tuple(map(shape_of, value))
    if isinstance(value, str | int | float | bool | torch.dtype | torch.device) or value is None:
        return value
    return type(value).__name__


def fresh(value: Any) -> Any:
    """The same tensors in new lists, into which a pipeline may write."""
    if isinstance(value, list):
        return [fresh(item) for item in value]
    if type(value) is tuple:
        return tuple(fresh(item) for item in value)
    return value
