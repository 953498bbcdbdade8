"""Offload hooks for decoding, which calls the parts of a model and not its forward.

Hooks of leaf modules (sequential and leaf-level group offload) run automatically. This module runs those of whole
models (accelerate's model offload, and the part of block-level group offload outside all blocks) and of decoder
layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import CpuOffload, SequentialHook
from diffusers.hooks.group_offloading import _get_group_onload_device, _is_group_offload_enabled
from torch import nn

__all__ = ["onloaded", "device_of", "group_hook"]


def device_of(module: nn.Module) -> torch.device:
    """The device that a module computes on: with offloading, its weights are elsewhere until its forward runs."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    if _is_group_offload_enabled(module):
        return torch.device(_get_group_onload_device(module))
    return next(module.parameters()).device


def group_hook(module: nn.Module | None) -> Any:
    """The group-offload hook around a module's forward, or None."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook("group_offloading")


@contextmanager
def onloaded(*models: Any) -> Iterator[None]:
    """Keep the weights of all models on their devices, as during their forwards.

    With model offload all of them are on the device together, because decoding alternates between model and drafter.
    With block-level group offload, decoder layers are still moved one by one.
    """
    offloads = [(hook, model) for model in models for hook in _model_hooks(model)]
    with ExitStack() as stack:
        # From the end of a chain to its start: loading one model offloads the one before it.
        for hook, model in sorted(offloads, key=lambda entry: _place(entry[0]), reverse=True):
            hook.pre_forward(model)
            stack.callback(hook.init_hook, model)
        for module in (part for model in models if isinstance(model, nn.Module) for part in model.modules()):
            hook = group_hook(module)
            if hook is not None and _is_rest(hook, module):
                hook.pre_forward(module)
                stack.callback(_send_away, hook, module, hook.group.offload_leader)
                hook.group.offload_leader = None  # else a forward in between would offload it
        yield


def _is_rest(hook: Any, module: nn.Module) -> bool:
    """Whether a hook covers what is outside all blocks; a leaf or a block is a member of its own group."""
    return hook.config.offload_type == "block_level" and all(part is not module for part in hook.group.modules)


def _send_away(hook: Any, module: nn.Module, leader: nn.Module) -> None:
    hook.group.offload_leader = leader
    hook.post_forward(module, None)


def _model_hooks(model: Any) -> list[Any]:
    hook = getattr(model, "_hf_hook", None)
    return [
        each for each in (hook.hooks if isinstance(hook, SequentialHook) else [hook]) if isinstance(each, CpuOffload)
    ]


def _place(hook: Any) -> int:
    """Number of models before it in accelerate's chain."""
    previous = getattr(hook.prev_module_hook, "hook", None)
    return 0 if previous is None else 1 + _place(previous)
