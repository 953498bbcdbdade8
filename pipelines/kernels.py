"""Fused kernels in stock pipelines: one line on, one line off.

    fastgen.enable_kernels(pipe)   # {"blocks": 57, "attention": 57, "decoder": 24}
    pipe("a red circle")
    fastgen.disable_kernels(pipe)

Nothing is patched but the objects of this pipeline: its transformer blocks and its VAE get forward passes of their
own, its attention modules processors that wrap theirs. Where kernels do not run (on a CPU, with
FASTGEN_KERNELS=reference, for arguments that a fused pass does not know) these call the stock code, so the result
there is the stock one, bit for bit. Loss contract: exact, up to rounding; after `disable_kernels`, bit for bit what it
was.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from fastgen.pipelines.fused import attention, blocks, decoders

__all__ = ["disable_kernels", "enable_kernels"]

logger = logging.getLogger(__name__)

_FORWARDS = {**blocks.BLOCKS, **decoders.DECODERS}
_OURS = set(_FORWARDS.values())
#: Of pipelines that contain none of this, nothing is served; they are named when they are refused.
_FAMILIES = (
    "DiT, FLUX, Stable Diffusion 3, Qwen-Image, Z-Image, and pipelines with an AutoencoderKL or Janus' VQ decoder"
)


def enable_kernels(pipe: Any) -> dict[str, int]:
    """Let a pipeline, or a model, compute with fused kernels. Doing it twice changes nothing.

    LoRA, model offload and `compile_repeated_blocks`, before or after, work as without. A block whose
    forward belongs to another hook (step caches, group offloading) is left alone and named in the log: enable kernels
    first, then the hook.

    Args:
        pipe: a diffusers pipeline, or one of its models.

    Returns:
        how many "blocks", "attention" modules and "decoder" modules compute with kernels now.

    Raises:
        ValueError: nothing in it is served.
    """
    counts: Counter[str] = Counter()
    shared: dict[int, Any] = {}  # attention modules may share one processor
    for module in _modules(pipe):
        kind = _install_forward(module) or _install_processor(module, shared)
        if kind:
            counts[kind] += 1
    if not counts:
        raise ValueError(f"pipe: {type(pipe).__name__} has nothing that kernels serve; there are {_FAMILIES}")
    logger.info("kernels enabled: %s", dict(counts))
    return dict(counts)


def served(pipe: Any) -> tuple[int, int]:
    """How many modules compute with kernels now, and how many others could; changes nothing."""
    enabled = others = 0
    for module in _modules(pipe):
        processor = getattr(module, "processor", None)
        if isinstance(processor, attention.FusedProcessor):
            enabled += 1
        elif _fits(module):
            ours = any(_is_ours(forward) for forward in _layers_of_forward(module))
            enabled, others = enabled + ours, others + (not ours)
        elif _fused_processor(module) is not None:
            others += 1
    return enabled, others


def disable_kernels(pipe: Any) -> None:
    """Take everything back that `enable_kernels` did; without it, nothing happens."""
    for module in _modules(pipe):
        if type(module) in _FORWARDS:
            _remove_forward(module)
        processor = getattr(module, "processor", None)
        if isinstance(processor, attention.FusedProcessor):
            module.set_processor(processor.stock)


def _modules(pipe: Any) -> Iterator[Any]:
    """All modules of a pipeline's models, or of a model."""
    if isinstance(pipe, nn.Module):
        models: list[Any] = [pipe]
    else:
        models = [part for part in getattr(pipe, "components", {}).values() if isinstance(part, nn.Module)]
        if not models:
            raise ValueError(f"pipe: needs a diffusers pipeline or a model, got {type(pipe).__name__}")
    for model in models:
        yield from model.modules()


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, partial) and forward.func in _OURS


def _fits(module: Any) -> bool:
    """Whether a fused forward can take the place of the module's."""
    kind = type(module)
    fits = blocks.fits if kind in blocks.BLOCKS else decoders.fits
    return kind in _FORWARDS and fits(module)


def _fused_processor(module: Any) -> Any:
    """The class of the fused processor that can wrap the module's own, or None."""
    fused = attention.PROCESSORS.get(type(getattr(module, "processor", None)))
    return fused if fused is not None and fused.fits(module) else None


def _install_forward(module: Any) -> str | None:
    """Give a module its fused forward; "blocks" or "decoder" if it has it afterwards."""
    kind = type(module)
    if not _fits(module):
        return None
    own = vars(module).get("forward", module.forward)
    if (_is_ours(own) or getattr(own, "__func__", None) is kind.forward) and not _hooked(module):
        # Not a closure: a copy of the module computes with its own weights. Not a bound method: it could not be
        # pickled, as the class has no method of that name.
        module.forward = partial(_FORWARDS[kind], module)
    elif not any(_is_ours(forward) for forward in _layers_of_forward(module)):
        logger.info("%s: another hook owns its forward; enable kernels before it", kind.__name__)
        return None
    return "blocks" if kind in blocks.BLOCKS else "decoder"


def _hooked(module: Any) -> bool:
    """Whether a hook of accelerate or diffusers has taken the forward over."""
    registry = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or bool(registry is not None and registry._fn_refs)


def _layers_of_forward(module: Any) -> list[Any]:
    """The forward of an instance, and what hooks of accelerate and diffusers put below theirs."""
    found = [vars(module).get("forward"), vars(module).get("_old_forward")]
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None:
        found += [reference.original_forward for reference in registry._fn_refs]
        found += [reference.forward for reference in registry._fn_refs]
    return found


def _remove_forward(module: Any) -> None:
    """Put the class's forward back, also below hooks that came later."""
    stock = type(module).forward.__get__(module)
    if _is_ours(vars(module).get("forward")):
        del module.forward
    if _is_ours(vars(module).get("_old_forward")):
        module._old_forward = stock
    registry = getattr(module, "_diffusers_hook", None)
    for reference in registry._fn_refs if registry is not None else ():
        for name in ("forward", "original_forward"):
            if _is_ours(getattr(reference, name)):
                setattr(reference, name, stock)


def _install_processor(module: Any, shared: dict[int, Any]) -> str | None:
    processor = getattr(module, "processor", None)
    if isinstance(processor, attention.FusedProcessor):
        return "attention"
    fused = _fused_processor(module)
    if fused is None:
        return None
    module.set_processor(shared.setdefault(id(processor), fused(processor)))
    return "attention"
