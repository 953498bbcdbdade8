"""Prepare the batches of the next steps in other processes while this one trains.

A batch is a function of (seed, step, process), so any process can prepare it. The generator's state after the batch is
returned with it, and the loss continues from that state.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

__all__ = ["Draw", "Prefetcher"]

Draw = Callable[[int], tuple[dict[str, Any], torch.Generator]]
_PER_WORKER = 2  # batches in flight per worker: one in preparation, one waiting
_draw: Draw | None = None  # of a worker process


def _begin(draw: Draw) -> None:
    global _draw
    # One thread per worker, so that `workers` sets the number of cores. Rendering needs no GPU.
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the trainer ends its own
    _draw = draw


def _work(step: int) -> tuple[dict[str, Any], Tensor]:
    if _draw is None:
        raise RuntimeError("the worker was not initialised")
    batch, generator = _draw(step)
    return batch, generator.get_state()


class Prefetcher:
    """Prepares the batches of steps first, first + 1, … last - 1; must be closed.

    Args:
        draw: returns the batch of a step and the generator after it; picklable.
        workers: processes, >= 1.
        first, last: steps.
    """

    def __init__(self, draw: Draw, workers: int, first: int, last: int) -> None:
        self.last, self.next = last, first
        self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (draw,))
        self.waiting: dict[int, Future[tuple[dict[str, Any], Tensor]]] = {}
        self.depth = _PER_WORKER * workers

    def __call__(self, step: int) -> tuple[dict[str, Any], torch.Generator]:
        """The batch of a step; call it for the steps in order."""
        while self.next < min(self.last, step + self.depth):
            self.waiting[self.next] = self.pool.submit(_work, self.next)
            self.next += 1
        batch, state = self.waiting.pop(step).result()
        generator = torch.Generator()
        generator.set_state(state)
        return batch, generator

    def close(self) -> None:
        """End the processes; unfinished batches are dropped."""
        self.pool.shutdown(wait=True, cancel_futures=True)
