"""Training-free accelerations of a dense Z-Image, to compare dynamic chunking with.

The step caches (first-block cache, TaylorSeer, MagCache) are diffusers' own. Token merging follows ToMe for Stable
Diffusion (Bolya & Hoffman, arXiv 2303.17604): before each attention the image tokens most like another one are
averaged into it, after it each gets a copy of its group's result. Loss contract of all: lossy.
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
from torch import Tensor, nn

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


@contextmanager
def token_merging(pipe: ZImagePipeline, ratio: float, grid: tuple[int, int]) -> Iterator[ZImagePipeline]:
    """`pipe` whose main attentions merge `ratio` of the image tokens.

    Args:
        pipe: a stock Z-Image pipeline.
        ratio: share of image tokens to merge, in [0, 0.75]: one token of every 2 x 2 stays.
        grid: rows and columns of image tokens.

    Raises:
        ValueError: ratio out of range.
    """
    if not 0 <= ratio <= 0.75:
        raise ValueError(f"ratio: needs a number in [0, 0.75], got {ratio}")
    attentions = [block.attention for block in pipe.transformer.layers]
    originals = [attention.processor for attention in attentions]
    for attention, original in zip(attentions, originals, strict=True):
        attention.set_processor(MergingProcessor(original, ratio, grid))
    try:
        yield pipe
    finally:
        for attention, original in zip(attentions, originals, strict=True):
            attention.set_processor(original)


class MergingProcessor:
    """Attention over merged image tokens; the other tokens of the sequence stay as they are.

    Args:
        inner: the processor that attends.
        ratio, grid: see `token_merging`.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, inner: Any, ratio: float, grid: tuple[int, int]) -> None:
        self.inner, self.ratio, self.grid = inner, ratio, grid

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [n, image tokens + others, D], rotary factors and mask alike -> [n, tokens, D]."""
        size = self.grid[0] * self.grid[1]
        image, rest = hidden_states[:, :size], hidden_states[:, size:]
        kept, group = merge_groups(image, self.grid, self.ratio)
        counts = torch.zeros(kept.shape, dtype=image.dtype, device=image.device)
        counts.scatter_add_(1, group, torch.ones_like(group, dtype=image.dtype))
        wide = group[..., None].expand(-1, -1, image.shape[-1])
        sums = torch.zeros(*kept.shape, image.shape[-1], dtype=image.dtype, device=image.device)
        merged = sums.scatter_add_(1, wide, image) / counts[..., None]
        shorter = torch.cat([merged, rest], dim=1)
        if freqs_cis is not None:  # a group has the position of the token that represents it
            freqs = freqs_cis.expand(len(image), -1, *freqs_cis.shape[2:])
            freqs_cis = torch.cat([_rows(freqs[:, :size], kept), freqs[:, size:]], dim=1)
        if attention_mask is not None:
            mask = attention_mask.expand(len(image), -1)
            attention_mask = torch.cat([_rows(mask[:, :size], kept), mask[:, size:]], dim=1)
        output = self.inner(attn, shorter, encoder_hidden_states, attention_mask, freqs_cis, **kwargs)
        length = kept.shape[1]
        return torch.cat([_rows(output[:, :length], group), output[:, length:]], dim=1)


def merge_groups(tokens: Tensor, grid: tuple[int, int], ratio: float) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: which tokens stay, and whose group each token joins.

    The first token of every 2 x 2 stays. Of the others, the `ratio` of all tokens whose nearest of those (by cosine)
    is nearest joins it.

    Args:
        tokens: [n, L, D] in raster order.
        grid: (H, W) with H * W = L.
        ratio: in [0, 0.75].

    Returns:
        positions of the tokens that stay [n, K], ascending, and for each token the index of its group in them [n, L].
    """
    n, length, _ = tokens.shape
    index = torch.arange(length, device=tokens.device)
    corner = (index // grid[1] % 2 == 0) & (index % grid[1] % 2 == 0)
    targets, sources = index[corner], index[~corner]
    unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
    likeness, nearest = (unit[:, sources] @ unit[:, targets].transpose(1, 2)).max(dim=-1)
    merged = min(int(ratio * length), len(sources))
    joining = likeness.argsort(dim=1, descending=True, stable=True)[:, :merged]
    stays = torch.ones(n, length, dtype=torch.bool, device=tokens.device)
    stays.scatter_(1, sources[joining], False)
    kept = index.expand(n, -1)[stays].view(n, length - merged)
    place = stays.long().cumsum(dim=1) - 1  # index of a staying token among those that stay
    group = place.scatter(1, sources[joining], place.gather(1, targets[nearest.gather(1, joining)]))
    return kept, group


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """values[i, index[i]] for values [n, L, ...] and index [n, K]."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]
