"""Diffusers' step caches around a backbone whose tokens change from step to step.

First-block cache, TaylorSeer and their like reuse what a block computed in an earlier step, token by token. With
dynamic chunking every step keeps other tokens, and what was stored belongs to none of them. So while a cache is in
use, the kept set is held for some steps, and whenever a new one is chosen the caches are reset: inside a hold they
see the fixed sequence they were made for (composability, section 11).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.hooks import HookRegistry, ModelHook, StateManager
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from fastgen.checks import check_integer
from fastgen.errors import FastgenError
from fastgen.models.chunking import Chunks

_lock = threading.Lock()
_in_use: set[int] = set()  # models whose caches a generation uses
_TAKES = 'FirstBlockCacheConfig attaches, and see "Step caches" in docs/dynamic-chunking.md'

HELD_STEPS = 4
"""Steps of one kept set while a cache is in use, where the user says nothing."""


def cacheable(block: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: registers with diffusers' caches that the block takes and returns `hidden_states` first."""
    # Not by `register`: that imports every transformer of diffusers.
    TransformerBlockRegistry._registry[block] = TransformerBlockMetadata(return_hidden_states_index=0, _cls=block)
    return block


@dataclass(slots=True)
class Held:
    chunks: Chunks
    used: int = 1


class HeldChunksMixin(CacheMixin):
    """A `CacheMixin` that holds the kept set as long as caches need it."""

    _hold: int | None = None
    _held: dict[str, Held]
    training: bool

    def hold_chunks(self, steps: int | None) -> None:
        """Choose which tokens to keep only every few steps.

        The router still gives every step its own probabilities. A set is held for one generation at most; a budget
        that changes meanwhile takes effect with the next set.

        Args:
            steps: steps of a kept set, at least 1; None means 1, and `HELD_STEPS` while a diffusers cache is enabled.

        Raises:
            ValueError: steps out of range.
        """
        self._hold = None if steps is None else check_integer("steps", steps, 1)
        self._held = {}

    def enable_cache(self, config: Any) -> None:
        """Attach one of diffusers' step caches.

        Raises:
            ValueError: the cache would save nothing here, or one is enabled already.
        """
        name = type(config).__name__
        if name == "SeaCacheConfig":  # it attaches, and then never skips anything
            raise FastgenError(f"config: {name} needs the scheduler's steps, which no pipeline tells it; {_TAKES}")
        super().enable_cache(config)
        if not any(_states(module) for module in self.modules() if module is not self):
            self.disable_cache()
            raise FastgenError(f"config: {name} finds nothing to cache in {type(self).__name__}; {_TAKES}")

    @contextmanager
    def caches(self) -> Iterator[None]:
        """One generation for the caches that are attached; they forget everything at its end.

        Raises:
            ValueError: they are in use by another one. Their state belongs to the model, not to a call.
        """
        if not self.is_caching:
            yield
            return
        with _lock:
            if id(self) in _in_use:
                raise FastgenError(
                    "transformer: its step cache is in use by another generation (in another thread, or around this "
                    "one); disable_cache(), or give each pipeline a transformer of its own"
                )
            _in_use.add(id(self))
        try:
            HookRegistry.check_if_exists_or_initialize(self).invalidate_child_registries_cache()
            with self.cache_context("denoise"):
                yield
        finally:
            with _lock:
                _in_use.discard(id(self))
            self._reset_stateful_cache()  # also after an interrupted generation: the next one starts fresh

    @property
    def is_caching(self) -> bool:
        """Whether a step cache is attached to any block, by `enable_cache` or by diffusers' `apply_…` functions."""
        return bool(self._caches())

    def held_chunks(self, samples: int, grid: tuple[int, int]) -> Chunks | None:
        """The set to keep in this forward pass, or None when it is to be chosen; counts the step."""
        caches = self._caches()
        if any(state._context is None for state in caches):
            raise FastgenError(
                "transformer: its step cache cannot see where a generation begins; call fastgen.enable_dc(pipe) on "
                "the stock pipeline, use DCZImagePipeline or DCDiTPipeline, or open transformer.cache_context(...)"
            )
        context = _context(caches)
        held = self._held_sets().get(context)
        if held is None or self.training or held.used >= self._steps(caches):
            return None
        if held.chunks.samples != samples or held.chunks.grid != grid:
            return None
        held.used += 1
        return held.chunks

    def keep_chunks(self, chunks: Chunks) -> None:
        """Take a newly chosen set; the caches forget what they hold of the previous one."""
        if self.training:
            return
        caches = self._caches()
        context = _context(caches)
        for cache in caches:
            cache._state_cache.pop(context, None)
        if self._steps(caches) > 1:
            self._held_sets()[context] = Held(chunks)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        # Pipelines call this after each generation: the next one starts with a set of its own.
        self._held = {}
        super()._reset_stateful_cache(recurse)

    def _held_sets(self) -> dict[str, Held]:
        if "_held" not in self.__dict__:
            self._held = {}
        return self._held

    def _steps(self, caches: list[StateManager]) -> int:
        if self._hold is not None:
            return self._hold
        return HELD_STEPS if caches else 1

    def _caches(self) -> list[StateManager]:
        """States of the caches that are attached to any block."""
        return [state for module in self.modules() for state in _states(module)]

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied: without the hooks of caches, which hold on to this very model."""
        return {**vars(_without_caches(self)), "_held": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        config = state.pop("_cache_config", None)
        super().__setstate__(state)
        if config is not None:
            self.enable_cache(config)


def _states(module: nn.Module) -> list[StateManager]:
    """States of the caches that are attached to one module."""
    registry: HookRegistry | None = getattr(module, "_diffusers_hook", None)
    hooks: dict[str, ModelHook] = {} if registry is None else registry.hooks
    stateful = [hook for hook in hooks.values() if hook._is_stateful]
    return [value for hook in stateful for value in vars(hook).values() if isinstance(value, StateManager)]


def _without_caches(module: nn.Module) -> nn.Module:
    """A shallow copy of a module and of all inside it, with the same parameters, without caches."""
    twin: nn.Module = object.__new__(type(module))
    vars(twin).update(vars(module))
    registry = vars(twin).get("_diffusers_hook")
    # An empty registry names the original module, too.
    if registry is not None and (_cached(module) or not registry.hooks):
        del twin._diffusers_hook
        vars(twin).pop("forward", None)
    twin._modules = {
        name: child if child is None else _without_caches(child) for name, child in module._modules.items()
    }
    return twin


def _cached(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return any("cache" in name or name.startswith("fbc") for name in ([] if registry is None else registry.hooks))


def _context(caches: list[StateManager]) -> str:
    """Name of the denoising call (`cache_context`) that a forward pass belongs to."""
    return "" if not caches or caches[0]._context is None else caches[0]._context.name
