"""diffusers' step caches as a part."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from fastgen.checks import check_choice, check_integer, check_number
from fastgen.errors import FastgenError
from fastgen.pipelines.accelerate.part import Part, Undo, denoising_network, remove_empty_hooks

__all__ = ["StepCache"]


@dataclass(frozen=True)
class StepCache(Part):
    """One of diffusers' step caches: blocks are skipped while what they compute changes little.

    Args:
        kind: "first-block" or "taylor-seer".
        threshold: of "first-block": relative change below which the other blocks are skipped, above 0.
        interval: of "taylor-seer": steps from one whole pass to the next, at least 2.
    """

    name = "step_cache"
    loss = "lossy"
    kind: str = "first-block"
    threshold: float = 0.1
    interval: int = 3

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("first-block", "taylor-seer"))
        check_number("threshold", self.threshold, above=0)
        check_integer("interval", self.interval, 2)

    def why_not(self, pipe: Any) -> str | None:
        from diffusers.models.cache_utils import CacheMixin

        model = denoising_network(pipe)
        if not isinstance(model, CacheMixin):
            return "its denoiser takes none of diffusers' step caches"
        if model.is_cache_enabled:
            return "a step cache is enabled already"
        if "cache_context" not in inspect.unwrap(type(pipe).__call__).__code__.co_names:
            return "its pipeline does not tell caches which pass is which"
        return None

    def enable(self, pipe: Any) -> Undo:
        from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

        model = denoising_network(pipe)
        plain = [module for module in model.modules() if not hasattr(module, "_diffusers_hook")]
        if self.kind == "first-block":
            model.enable_cache(FirstBlockCacheConfig(threshold=self.threshold))
        else:
            model.enable_cache(TaylorSeerCacheConfig(cache_interval=self.interval, use_lite_mode=True))
        attached = any(hasattr(module, "_diffusers_hook") for module in plain)

        def undo() -> None:
            model.disable_cache()
            vars(model).pop("_cache_config", None)  # the class has it: None
            remove_empty_hooks(plain)

        if not attached:
            undo()
            raise FastgenError(f"step_cache: {self.kind} attaches to nothing in {type(model).__name__}")
        return undo
