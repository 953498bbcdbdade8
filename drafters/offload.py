"""Weights that offloading keeps elsewhere until a forward pass: decoding calls the parts of a model, not its forward.

Hooks of leaves (sequential and leaf-level group offload) run by themselves. Those of a whole model (accelerate's model
offload, the part of block-level group offload that belongs to no block) and of decoder layers are run from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import CpuOffload, SequentialHook
from diffusers.hooks.group_offloading import _get_group_onload_device, _is_group_offload_enabled
from torch import nn

__all__ = ["brought_in", "device_of", "group_hook"]


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: with offloading its weights are elsewhere until its forward runs."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    if _is_group_offload_enabled(module):
        return torch.device(_get_group_onload_device(module))
    return next(module.parameters()).device


def group_hook(module: nn.Module | None) -> Any:
    """The hook of group offload that runs around a module's forward, or None."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook("group_offloading")


@contextmanager
def brought_in(*models: Any) -> Iterator[None]:
    """The weights of several models are where they compute, as if their forwards ran.

    With model offload all of them are on the device together, because decoding goes back and forth between model and
    drafter. With block-level group offload decoder layers still come and go.
    """
    offloads = [(hook, model) for model in models for hook in _model_hooks(model)]
    with ExitStack() as stack:
        # From the end of a chain to its start: bringing one in sends the one before it away.
        for hook, model in sorted(offloads, key=lambda entry: _place(entry[0]), reverse=True):
            hook.pre_forward(model)
            stack.callback(hook.init_hook, model)
        for module in (part for model in models if isinstance(model, nn.Module) for part in model.modules()):
            hook = group_hook(module)
            if hook is not None and _is_rest(hook, module):
                hook.pre_forward(module)
                stack.callback(_send_away, hook, module, hook.group.offload_leader)
                hook.group.offload_leader = None  # else a forward in between would send it away
        yield


def _is_rest(hook: Any, module: nn.Module) -> bool:
    """Whether a hook is of what belongs to no block; a leaf or a block is a member of its own group."""
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
    """How many models come before in accelerate's chain."""
    previous = getattr(hook.prev_module_hook, "hook", None)
    return 0 if previous is None else 1 + _place(previous)
