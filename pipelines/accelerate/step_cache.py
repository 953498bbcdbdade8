"""diffusers' step caches as a part."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastgen.checks import check_choice, check_integer, check_number
from fastgen.errors import FastgenError
from fastgen.pipelines.accelerate.part import Part, Undo, added_attributes, denoising_network

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
        return _unknown_block(model) if self.kind == "first-block" else None

    def enable(self, pipe: Any) -> Undo:
        from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

        model = denoising_network(pipe)
        config: Any = (
            FirstBlockCacheConfig(threshold=self.threshold)
            if self.kind == "first-block"
            else TaylorSeerCacheConfig(cache_interval=self.interval, use_lite_mode=True)
        )
        clean, unhooked = added_attributes(model), _hooks(model)

        def undo() -> None:
            model._cache_config = config  # so that an attempt that failed half way is taken back too
            model.disable_cache()
            clean()

        try:
            model.enable_cache(config)
            if _hooks(model) == unhooked:
                raise FastgenError(f"step_cache: {self.kind} attaches to nothing in {type(model).__name__}")
        except BaseException:
            undo()
            raise
        return undo


def _hooks(model: Any) -> int:
    """Number of diffusers' hooks in a model."""
    registries = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    return sum(len(each.hooks) for each in registries if each is not None)


def _unknown_block(model: Any) -> str | None:
    """Why diffusers' first-block cache does not read the blocks of this model, if it does not."""
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
    from diffusers.hooks._helpers import TransformerBlockRegistry

    lists = [each for name, each in model.named_children() if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS]
    blocks = [block for each in lists if isinstance(each, nn.ModuleList) for block in each]
    if len(blocks) < 2:
        return "its denoiser has fewer than two blocks that diffusers knows"
    for kind in {type(block) for block in blocks}:
        try:
            TransformerBlockRegistry.get(kind)
        except ValueError:
            return f"diffusers' first-block cache does not know {kind.__name__}"
        if kind.__name__ == "Flux2SingleTransformerBlock":  # it subtracts a list from a tensor (diffusers 0.42)
            return f"diffusers' first-block cache fails with {kind.__name__}"
    return None
