"""What the denoising loop of a pipeline depends on, read from its source."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

__all__ = ["asks_to_go_on", "counts_steps", "denoising_loops"]


@functools.cache
def counts_steps(call: Callable[..., Any]) -> bool:
    """Whether what the model reads depends on the number of the step or on the length of the schedule.

    ControlNet's `control_guidance_end`, Lumina's `cfg_trunc_ratio`, guiders with a start and an end, and models that
    read the next time as well are of this kind. Source that cannot be read counts as such.

    Args:
        call: `__call__` of a pipeline's class.
    """
    loops = denoising_loops(call)
    return not loops or any(_counts(loop) for loop in loops)


@functools.cache
def asks_to_go_on(call: Callable[..., Any]) -> bool:
    """Whether the only denoising loop begins each round with ``if self.interrupt: continue``, and nothing else reads
    that.

    Args:
        call: `__call__` of a pipeline's class.
    """
    loops = denoising_loops(call)
    if len(loops) != 1 or _source(call).count("self.interrupt") != 1:
        return False
    first = loops[0].body[0]
    return isinstance(first, ast.If) and ast.unparse(first).split() == ["if", "self.interrupt:", "continue"]


@functools.cache
def denoising_loops(call: Callable[..., Any]) -> list[ast.For]:
    """Loops of a pipeline's `__call__` with a step of its scheduler; empty where the source cannot be read."""
    try:
        tree = ast.parse(_source(call))
    except (OSError, TypeError, SyntaxError):
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.For) and _steps(node)]


def _source(call: Callable[..., Any]) -> str:
    return textwrap.dedent(inspect.getsource(inspect.unwrap(call)))


def _counts(loop: ast.For) -> bool:
    # `for i, t in enumerate(timesteps)`; a loop without `enumerate` has no number.
    names = {"num_inference_steps"}
    if isinstance(loop.target, ast.Tuple) and isinstance(loop.target.elts[0], ast.Name):
        names |= {loop.target.elts[0].id, *(node.id for node in ast.walk(loop.iter) if isinstance(node, ast.Name))}
    before = _before_step(loop.body)
    return any(isinstance(node, ast.Name) and node.id in names - {"self", "enumerate"} for node in before)


def _before_step(body: list[ast.stmt]) -> list[ast.AST]:
    """Everything in the loop before the scheduler's step."""
    found: list[ast.AST] = []
    for statement in body:
        if _steps(statement):
            break
        found += ast.walk(statement)
    return found


def _steps(node: ast.AST) -> bool:
    """Whether it has a call `…scheduler.step(…)`."""
    calls = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
    return any(
        isinstance(call, ast.Attribute) and call.attr == "step" and "scheduler" in ast.unparse(call.value)
        for call in calls
    )
