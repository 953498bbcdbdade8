"""What `accelerate` does to each family of pipelines; `python accelerate_table.py` writes the table in the docs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerated import draw, state
from stock_families import FAMILIES, family

import fastgen
from fastgen.pipelines.accelerate.parts import (
    Attention,
    ChannelsLast,
    DBCache,
    FewerSteps,
    Guidance,
    Part,
    PromptPadding,
    Quantize,
    Solver,
    StepCache,
    TextEncoder,
    VaeSlicing,
)

DOCUMENT = Path(__file__).parents[2] / "docs/accelerate-pipelines.md"
EXACT = (ChannelsLast(), PromptPadding(), Attention("_native_math"), VaeSlicing(), TextEncoder())
LOSSY = (
    Quantize(),
    StepCache(),
    StepCache("taylor-seer"),
    DBCache(warmup=1),
    Guidance(0.5),
    FewerSteps(0.5),
    Solver(),
)


def usable(pipe: Any, parts: tuple[Part, ...]) -> list[Part]:
    return [part for part in parts if part.why_not(pipe) is None]


def check(name: str, plan: list[Part] | None) -> None:
    """Exact parts give the stock picture up to rounding, lossy ones a picture; off is bit for bit what it was."""
    pipe = family(name)
    expected, before = draw(pipe, name), state(pipe)
    with fastgen.accelerated(pipe, plan=plan) as made:
        drawn = draw(pipe, name)
    assert drawn.shape == expected.shape and torch.isfinite(drawn).all()
    if made.loss == "exact":
        # A quarter of a level of 8 bits; the random network of Kandinsky 3 amplifies rounding.
        bound = (1e-2 if name == "kandinsky3" else 1e-3) * max(1.0, float(expected.std()))
        assert float((drawn - expected).abs().max()) <= bound
    assert state(pipe) == before
    assert torch.equal(draw(pipe, name), expected)


def line(name: str) -> str:
    """Of the table."""
    pipe = family(name)
    exact, lossy = usable(pipe, EXACT), usable(pipe, LOSSY)
    check(name, None)
    check(name, exact)
    for part in lossy:
        check(name, [part])
    names = (", ".join(f"`{_label(part)}`" for part in parts) for parts in (exact, lossy))
    return f"| {name} | `{type(pipe).__name__}` | yes | yes | {' | '.join(names)} |"


def _label(part: Part) -> str:
    return f"{part.name} {part.kind}" if isinstance(part, StepCache) else part.name


def table() -> str:
    return "\n".join([HEAD, *map(line, FAMILIES), ""])


HEAD = """# Pipelines that can be accelerated

Each line is a tiny pipeline with random weights that the tests draw with on a CPU, with the extras `quantize` and
`cache`. "Equal": under `accelerate(pipe)`, and under all exact parts of the line together, the picture is the stock
one up to float32 rounding (1e-3 of 1 or of its standard deviation; Kandinsky 3: 1e-2). "Restored": after `restore`,
and after each of the lossy parts, the pipeline draws the stock picture bit for bit, and its weights, layouts, hooks
and processors are what they were. `kernels`, `bfloat16`, faster attention and `compile` are not in this table.

| family | pipeline | equal | restored | exact parts | lossy parts, by a plan |
| --- | --- | --- | --- | --- | --- |"""

if __name__ == "__main__":
    DOCUMENT.write_text(table())
