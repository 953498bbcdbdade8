"""Prompts are encoded once, and text encoders leave a GPU that is short of memory."""

from __future__ import annotations

import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastgen.checks import check_choice, check_integer
from fastgen.pipelines.accelerate.calls import change_encoding
from fastgen.pipelines.accelerate.part import Part, Undo, denoising_network
from fastgen.pipelines.loading.memory import free_memory

__all__ = ["TextEncoder"]

_PLAIN = (str, int, float, bool, type(None), torch.device, torch.dtype)
#: What pipelines keep of a call and may read while they encode.
_OF_THE_CALL = ("guidance", "cfg", "clip", "scale", "length")
#: Memory that denoising takes, as a share of the denoiser's weights.
_WORKING = 0.3


@dataclass(frozen=True)
class TextEncoder(Part):
    """Prompts are encoded once, and text encoders wait in main memory while the denoiser works.

    Args:
        free: "auto" moves text encoders away if the GPU has little memory left; "always", "never".
        prompts: results to remember, 0 for none.
    """

    name = "text_encoder"
    loss = "exact"
    free: str = "auto"
    prompts: int = 16

    def __post_init__(self) -> None:
        check_choice("free", self.free, ("auto", "always", "never"))
        check_integer("prompts", self.prompts, 0)

    def why_not(self, pipe: Any) -> str | None:
        if not hasattr(type(pipe), "encode_prompt") or not _encoders(pipe):
            return "it has no text encoder with encode_prompt"
        if not self.prompts and not self._frees(pipe):
            return "nothing to remember, and text encoders take no memory that is short"
        return None

    def enable(self, pipe: Any) -> Undo:
        memory: OrderedDict[Any, Any] = OrderedDict()
        away: list[nn.Module] = []
        reference = weakref.ref(pipe)

        def back() -> None:
            while away:
                away.pop().to(denoising_network(reference()).device)

        def encode(stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            key = _key(stock, args, kwargs) if self.prompts else None
            if key is None or key not in memory:
                back()
                result = stock(*args, **kwargs)
                if self._frees(pipe := stock.args[0]):  # type: ignore[attr-defined]
                    away.extend(each.cpu() for each in _encoders(pipe))
                    torch.cuda.empty_cache()
                if key is None:
                    return result
                memory[key] = _copied(result)
                while len(memory) > self.prompts:
                    memory.popitem(last=False)
                return result
            memory.move_to_end(key)
            return _copied(memory[key])

        undo_encoding = change_encoding(pipe, encode)

        def undo() -> None:
            undo_encoding()
            back()

        return undo

    def _frees(self, pipe: Any) -> bool:
        model = denoising_network(pipe)
        device = model.device
        if self.free == "never" or device.type != "cuda" or _moved_by_hooks(pipe):
            return False
        size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        return self.free == "always" or (free_memory(device) or 0) < _WORKING * size


def memory_is_short(pipe: Any) -> bool:
    """Whether text encoders have to leave the GPU for the denoiser to work."""
    part = TextEncoder(prompts=0)
    return part.why_not(pipe) is None


def _moved_by_hooks(pipe: Any) -> bool:
    """Whether offloading moves its weights already."""
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    models = [each for each in pipe.components.values() if isinstance(each, nn.Module)]
    return any(hasattr(each, "_hf_hook") or _is_group_offload_enabled(each) for each in models)


def _encoders(pipe: Any) -> list[nn.Module]:
    parts = pipe.components.items()
    return [part for name, part in parts if name.startswith("text_encoder") and isinstance(part, nn.Module)]


def _key(stock: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All that the result depends on; None if that is more than texts and numbers."""
    pipe = stock.args[0]
    given = inspect.signature(stock).bind(*args, **kwargs).arguments
    encoders = _encoders(pipe)
    values = _frozen(given)
    if values is None or any(each.training for each in encoders):
        return None
    kept = [(name, value) for name, value in vars(pipe).items() if any(part in name for part in _OF_THE_CALL)]
    settings = tuple((name, value) for name, value in kept if isinstance(value, _PLAIN))
    others = tuple(id(part) for part in pipe.components.values() if not isinstance(part, nn.Module))
    return values, settings, others, tuple(map(_weights, encoders))


def _frozen(value: Any) -> Any:
    """Hashable; None if something in it is no text and no number."""
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, dict):
        value = sorted(value.items())
    if not isinstance(value, list | tuple):
        return None
    parts = tuple(_frozen(each) for each in value)
    return None if None in parts else (type(value), parts)


def _weights(encoder: nn.Module) -> Any:
    """Differs when an encoder, one of its weights or its LoRA adapters was changed."""
    weights = tuple(
        (id(each), 0 if each.is_inference() else each._version, each.dtype) for each in encoder.parameters()
    )
    layers: list[Any] = [each for each in encoder.modules() if hasattr(each, "scaling")]
    adapters = tuple(
        (tuple(each.active_adapters), tuple(each.scaling.items()), each.disable_adapters, tuple(each.merged_adapters))
        for each in layers
        if hasattr(each, "active_adapters")
    )
    return weakref.ref(encoder), weights, adapters


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(_copied(each) for each in value)
    if isinstance(value, dict):
        return {name: _copied(each) for name, each in value.items()}
    return value
