"""Training-free accelerations of a dense Z-Image, to compare dynamic chunking with.

First-block cache, TaylorSeer and MagCache are diffusers' own. Loss contract of all: lossy.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig, ZImagePipeline
from diffusers.hooks import HookRegistry, apply_first_block_cache, apply_mag_cache, apply_taylorseer_cache
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.first_block_cache import _FBC_BLOCK_HOOK, _FBC_LEADER_BLOCK_HOOK
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.hooks.mag_cache import _MAG_CACHE_BLOCK_HOOK, _MAG_CACHE_LEADER_BLOCK_HOOK
from diffusers.hooks.taylorseer_cache import _TAYLORSEER_CACHE_HOOK
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock

_APPLY: dict[type, Any] = {
    FirstBlockCacheConfig: apply_first_block_cache,
    MagCacheConfig: apply_mag_cache,
    TaylorSeerCacheConfig: apply_taylorseer_cache,
}
_HOOKS = (
    _FBC_LEADER_BLOCK_HOOK,
    _FBC_BLOCK_HOOK,
    _MAG_CACHE_LEADER_BLOCK_HOOK,
    _MAG_CACHE_BLOCK_HOOK,
    _TAYLORSEER_CACHE_HOOK,
)


class CachedZImagePipeline(ZImagePipeline):
    """A Z-Image pipeline whose transformer has a step cache: sets its context in each call, resets it at the end."""

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Draw; arguments of the stock pipeline."""
        _set_cache_context(self.transformer, CacheContext("denoise"))
        try:
            return super().__call__(*args, **kwargs)
        finally:
            HookRegistry.check_if_exists_or_initialize(self.transformer).reset_stateful_hooks(recurse=True)

    __call__.__signature__ = inspect.signature(ZImagePipeline.__call__)  # type: ignore[attr-defined]


@contextmanager
def step_cache(pipe: ZImagePipeline, config: Any) -> Iterator[ZImagePipeline]:
    """`pipe` with one of diffusers' step caches.

    The stock Z-Image has no `enable_cache`, and its blocks call their tokens `x` where a cache asks for
    `hidden_states`: both are made up for here.

    Args:
        pipe: a stock Z-Image pipeline.
        config: a `FirstBlockCacheConfig`, `MagCacheConfig` or `TaylorSeerCacheConfig`.
    """
    cached = CachedZImagePipeline(**pipe.components)
    cached.set_progress_bar_config(disable=True)
    TransformerBlockRegistry.get(ZImageTransformerBlock)._cached_parameter_indices = {"hidden_states": 0}
    _APPLY[type(config)](pipe.transformer, config)
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.invalidate_child_registries_cache()
    try:
        yield cached
    finally:
        for name in _HOOKS:
            registry.remove_hook(name, recurse=True)
        registry.invalidate_child_registries_cache()


def taylor_seer(interval: int) -> TaylorSeerCacheConfig:
    """TaylorSeer for Z-Image's blocks, which none of its own patterns matches.

    Args:
        interval: steps from one full pass to the next.
    """
    blocks = [r"layers\.\d+\.(attention|feed_forward)"]
    return TaylorSeerCacheConfig(cache_interval=interval, cache_identifiers=blocks, taylor_factors_dtype=torch.float32)


def mag_ratios(pipe: ZImagePipeline, prompts: list[str], steps: int, **settings: Any) -> list[float]:
    """MagCache's calibration: how the blocks' update grows from step to step.

    Args:
        pipe: a stock Z-Image pipeline.
        prompts: to calibrate with, not those of an evaluation.
        steps: of a generation.
        settings: further arguments of the pipeline.
    """
    found: list[float] = []

    def note(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        hook: Any = pipeline.transformer.layers[0]._diffusers_hook.get_hook(_MAG_CACHE_LEADER_BLOCK_HOOK)
        found[:] = hook.state_manager.get_state().calibration_ratios
        return tensors

    # One step more than there are: at the last one the cache would forget them.
    with step_cache(pipe, MagCacheConfig(calibrate=True, num_inference_steps=steps + 1)) as cached:
        cached(
            prompts,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
            output_type="latent",
            callback_on_step_end=note,
            **settings,
        )
    return found
