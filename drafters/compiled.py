"""Compiled decoding steps: one graph for draft, target pass, verification and commit.

A step is a few hundred small operators. Launching them takes half of a small target's time on a CPU and nearly all of
it on a GPU. Compiling takes up to a minute per step (inductor caches the result on disk). Every batch size (also after
finished images leave), sampler, rule, tree and longer prompt needs another graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

__all__ = ["compiled", "many_graphs"]

_GRAPHS = 64


@cache
def compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step as one graph; shapes are static."""
    return torch.compile(step, fullgraph=True, dynamic=False)


def many_graphs(compile: bool) -> AbstractContextManager[Any]:
    """Allow many graphs per step: one object serves all rules and trees."""
    if not compile:
        return nullcontext()
    return torch._dynamo.config.patch(recompile_limit=_GRAPHS, accumulated_recompile_limit=4 * _GRAPHS)
