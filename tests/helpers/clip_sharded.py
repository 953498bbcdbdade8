"""Run under torchrun: one step of SGD with clipped gradients, weights divided between the processes.

Without torchrun the same step in one process, on all items. Argument: where the first process writes what it got.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastgen.training.sharding import clip_gradients, end_process, gather_weights, shard

ITEMS, LIMIT = 6, 0.5


def clipped_step(process: int = 0, processes: int = 1) -> dict[str, Any]:
    """The norm before clipping, and the weights after a step of rate 1; in all processes together on `ITEMS` items."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()
    items = torch.randn(ITEMS, 5, dtype=torch.float64).chunk(processes)[process]
    if processes > 1:
        shard(module, torch.device("cpu"))
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    (10 * module(items).square().sum(dim=1).mean()).backward()
    norm = clip_gradients(list(module.parameters()), LIMIT)
    optimizer.step()
    if processes > 1:
        gather_weights(module, process == 0)
    return {"norm": norm, "weights": {name: param.detach() for name, param in module.named_parameters()}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    result = clipped_step(rank, dist.get_world_size())
    norms: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(norms, result["norm"])
    if rank == 0:
        torch.save({**result, "norms": norms}, Path(sys.argv[1]))
    end_process()
