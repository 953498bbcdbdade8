"""Compiled steps of decoding: one graph for draft, target pass, verification and commit.

A step is a few hundred small operators; on a CPU half of the time of a small target goes into starting them, on a GPU
nearly all. Compiling takes up to a minute a step (inductor keeps the result on disk); another batch size (also that
of a batch from which finished images left), sampler, rule, tree or longer prompt is another graph.
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
    """Within it a step may have many graphs: one object serves all rules and trees."""
    if not compile:
        return nullcontext()
    return torch._dynamo.config.patch(recompile_limit=_GRAPHS, accumulated_recompile_limit=4 * _GRAPHS)
