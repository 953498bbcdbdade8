"""FSDP2 for the trainer: weights, gradients and optimizer state are sharded across processes.

Applies `torch.distributed.fsdp.fully_shard` to every block in a model's `_no_split_modules`, then to the rest. Each
process writes and reads its own shard of a checkpoint (`torch.distributed.checkpoint`).
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

__all__ = [
    "clip_gradients",
    "end_process",
    "gather_weights",
    "load_parts",
    "remove_parts",
    "save_parts",
    "shard",
    "sharding_asked",
]

_PARTS = "checkpoint-{step}"


def sharding_asked() -> bool:
    """Whether `accelerate launch` was configured for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def end_process() -> None:
    """Destroy the process group and end the process with status 0; without a group, do nothing.

    After `fully_shard` the group's threads outlive the group. If they still run while Python shuts down, the process
    aborts in about one of twenty runs, and torchrun reports a finished run as failed. So Python does not shut down.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def shard(module: torch.nn.Module, device: torch.device) -> None:
    """Shard a module's parameters across the processes, in place.

    Weights are gathered in their own dtype; autocast chooses the precision of each operation.

    Args:
        module: the same in all processes; its parameters are replaced.
        device: of this process and its shards.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    parts = list(module.modules())
    whole = {name for part in parts for name in getattr(part, "_no_split_modules", None) or ()}
    for part in reversed(parts[1:]):  # inner ones first
        if type(part).__name__ in whole:
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)


def clip_gradients(parameters: list[torch.nn.Parameter], limit: float) -> float:
    """Scale sharded gradients so that their norm over all processes is at most `limit`; returns the norm."""
    norm = torch.nn.utils.get_total_norm([param.grad for param in parameters if param.grad is not None])
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, whole)
    return float(whole)


@torch.no_grad()
def gather_weights(module: torch.nn.Module, keep: bool) -> None:
    """Replace the shards by full weights on the CPU, in processes with `keep`; all processes must call it.

    The module can be read and saved afterwards, but not trained.
    """
    for part in list(module.modules()):
        for name, param in list(part.named_parameters(recurse=False)):
            if isinstance(param, DTensor):
                whole = param.full_tensor()
                if keep:
                    setattr(part, name, torch.nn.Parameter(whole.cpu(), param.requires_grad))


def save_parts(folder: Path, step: int, module: torch.nn.Module, averages: list[Any], optimizers: list[Any]) -> None:
    """Write trained weights, their averages and the optimizers of a step; each process writes its shard."""
    save(_state(module, averages, optimizers), checkpoint_id=folder / _PARTS.format(step=step))


def load_parts(folder: Path, step: int, module: torch.nn.Module, averages: list[Any], optimizers: list[Any]) -> None:
    """Read what `save_parts` wrote."""
    state = _state(module, averages, optimizers)
    load(state, checkpoint_id=folder / _PARTS.format(step=step))
    set_optimizer_state_dict(module, optimizers, state["optimizers"])


def remove_parts(folder: Path, step: int) -> None:
    """Remove the shards of all other steps."""
    for path in folder.glob(_PARTS.format(step="*")):
        if path.name != _PARTS.format(step=step):
            shutil.rmtree(path)


def _state(module: torch.nn.Module, averages: list[Any], optimizers: list[Any]) -> dict[str, Any]:
    trained = {name: param.detach() for name, param in module.named_parameters() if param.requires_grad}
    return {
        "module": trained,
        "averages": dict(zip(trained, averages, strict=True)),
        "optimizers": get_optimizer_state_dict(module, optimizers),
    }
