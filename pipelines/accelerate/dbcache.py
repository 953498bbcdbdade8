"""DBCache of cache-dit as a part."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from fastgen.checks import check_integer, check_number
from fastgen.errors import FastgenError, one_line
from fastgen.pipelines.accelerate.calls import change_calls, takes
from fastgen.pipelines.accelerate.part import Part, Undo, added_attributes, denoising_network
from fastgen.pipelines.stock_arguments import defaults_of

__all__ = ["DBCache"]


@dataclass(frozen=True)
class DBCache(Part):
    """DBCache of cache-dit: the middle blocks are skipped while the first ones change little.

    Args:
        threshold: relative change of the first blocks' output below which the others are skipped, above 0.
        first, last: blocks at both ends that are always computed.
        warmup: steps that are computed whole.
    """

    name = "dbcache"
    loss = "lossy"
    threshold: float = 0.08
    first: int = 1
    last: int = 0
    warmup: int = 4

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, above=0)
        check_integer("first", self.first, 1)
        check_integer("last", self.last, 0)
        check_integer("warmup", self.warmup, 0)

    def why_not(self, pipe: Any) -> str | None:
        if importlib.util.find_spec("cache_dit") is None:
            return "cache-dit is not installed (python -m pip install cache-dit)"
        from cache_dit import BlockAdapterRegister

        model = denoising_network(pipe)
        if getattr(model, "is_cache_enabled", False) or getattr(model, "_is_cached", False):
            return "a step cache is enabled already"
        if not takes(pipe, "num_inference_steps"):
            return "its call takes no number of steps"
        if not BlockAdapterRegister.is_supported(model):
            return f"cache-dit does not know {type(model).__name__}"
        return None

    def enable(self, pipe: Any) -> Undo:
        import cache_dit

        model = denoising_network(pipe)
        clean = added_attributes(model)
        default = defaults_of(type(pipe))["num_inference_steps"]

        def undo() -> None:
            cache_dit.disable_cache(model)
            clean()

        def refresh(given: dict[str, Any]) -> None:
            steps = given.get("num_inference_steps", default)
            cache_dit.refresh_context(model, num_inference_steps=steps)

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=self.first,
            Bn_compute_blocks=self.last,
            residual_diff_threshold=self.threshold,
            max_warmup_steps=self.warmup,
        )
        try:
            cache_dit.enable_cache(model, cache_config=config)
        except BaseException as error:
            undo()
            if isinstance(error, Exception):
                raise FastgenError(f"dbcache: {type(model).__name__}: {one_line(error)}") from error
            raise
        undo_call = change_calls(pipe, refresh)

        def undo_all() -> None:
            undo_call()
            undo()

        return undo_all
