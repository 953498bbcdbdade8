"""Run twice, as two processes of one group: a pipeline under context parallelism and without. Arguments: rank, file.

Prints one JSON object: the largest difference between the pictures, and what is left of it when it is off.
"""

from __future__ import annotations

import json
import sys

import torch
from accelerated import draw, state
from stock_families import family
from torch import distributed

import fastgen
from fastgen.pipelines.accelerate.parts import ContextParallel


def main(rank: int, store: str, name: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    pipe = family(name)
    expected, before = draw(pipe, name), state(pipe)
    reason = ContextParallel().why_not(pipe)
    # diffusers divides by the number of accelerators and then computes on this device as well.
    torch.accelerator.device_count = lambda: 1
    with fastgen.accelerated(pipe, plan=[ContextParallel()]):
        twice = ContextParallel().why_not(pipe)
        seen: list[int] = []
        hook = pipe.transformer.transformer_blocks[0].register_forward_hook(
            lambda module, args, kwargs, output: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
        )
        difference = float((draw(pipe, name) - expected).abs().max())
        hook.remove()
    left = [key for key, value in state(pipe).items() if before.get(key) != value]
    same = torch.equal(draw(pipe, name), expected)
    found = {"reason": reason, "twice": twice, "difference": difference, "left": left, "same": same, "tokens": seen}
    print(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
