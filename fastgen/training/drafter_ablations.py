"""Which terms of drafter training matter: a drafter trained with one of them changed at a time.

All variants see the same pictures and are judged by the same prompts and seeds with the exact rule: what counts is how
many drafted tokens the target's own law accepts. A term that pays only under a relaxed rule is relaxation by another
name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.data.shapes import ShapesWorld
from fastgen.drafters.acceptance import Exact
from fastgen.drafters.decode import decode_speculative
from fastgen.drafters.loading import load_drafter
from fastgen.drafters.sources import TreeSource
from fastgen.drafters.tree import named_tree
from fastgen.environment import environment
from fastgen.errors import FastgenError
from fastgen.training.drafter import DrafterRecipe, DrafterTerms
from fastgen.training.engine import Trainer
from fastgen.training.recipes import train_config

__all__ = ["TREES", "VARIANTS", "benchmark_drafter_ablations"]

#: What is changed: terms of the loss, and under "drafter" arguments of the recipe.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "class cross-entropy": {"redundancy": "class"},
    "soft targets": {"redundancy": "soft"},
    "convergence": {"convergence": True},
    "class cross-entropy, convergence": {"redundancy": "class", "convergence": True},
    "teacher forcing only": {"steps": 1},
    "no feature loss": {"feature": 0.0},
    "no feature noise": {"feature_noise": 0.0},
    "half as wide": {"drafter": {"width": 128}},
    "EAGLE-3": {"drafter": {"variant": 3}},
    "Medusa": {"drafter": {"kind": "medusa"}},
}
TREES = ("chain-4", "4-4-2-1")
_BATCH = 32


def benchmark_drafter_ablations(
    model: Path,
    folder: Path,
    *,
    steps: int = 600,
    batch_size: int = 16,
    seed: int = 0,
    variants: Sequence[str] | None = None,
    pictures: int = 64,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train and compare.

    Args:
        model: folder of the target.
        folder: of the trained variants; a killed run continues there.
        steps, batch_size, seed: of training.
        variants: names from `VARIANTS`; None takes all.
        pictures: drawn by each, of prompts that training does not see.
        report: told what is going on.

    Returns:
        a JSON-ready dict: "environment", "settings" and "rows" with variant, changes, parameters, and per tree the
        accepted length (the bonus counted: tokens a round), and its paired difference to the first row with the
        standard error over pictures.

    Raises:
        FastgenError: unknown variant, or pictures < 2.
    """
    chosen = list(VARIANTS) if variants is None else list(variants)
    if unknown := [name for name in chosen if name not in VARIANTS]:
        raise FastgenError(f"variant: {unknown[0]!r} is unknown, needs one of {', '.join(VARIANTS)}")
    if pictures < 2:
        raise FastgenError(f"pictures: {pictures} is not allowed, needs an integer >= 2")
    rows: list[dict[str, Any]] = []
    base: dict[str, Tensor] = {}
    for name in chosen:
        report(name)
        terms = {key: value for key, value in VARIANTS[name].items() if key != "drafter"}
        recipe = DrafterRecipe(seed, model, terms=DrafterTerms(**terms), **VARIANTS[name].get("drafter", {}))
        place = folder / name.replace(" ", "-").replace(",", "")
        settings = {"steps": steps, "batch_size": batch_size, "seed": seed, "warmup": steps // 10, "accumulate": 1}
        Trainer(recipe, train_config("drafter", place, **settings)).run()
        drafter = load_drafter(place / "model", torch.float32)  # the averaged weights
        lengths = {tree: _tokens_a_round(recipe, drafter, tree, pictures, seed) for tree in TREES}
        base = base or lengths
        rows.append(
            {
                "variant": name,
                "changes": VARIANTS[name],
                "parameters": sum(parameter.numel() for parameter in drafter.parameters()),
                "trees": {tree: _summary(values, base[tree]) for tree, values in lengths.items()},
            }
        )
    return {
        "benchmark": "drafter-ablations",
        "environment": environment(),
        "settings": {"steps": steps, "batch_size": batch_size, "seed": seed, "pictures": pictures},
        "rows": rows,
    }


def _tokens_a_round(recipe: DrafterRecipe, drafter: Any, tree: str, pictures: int, seed: int) -> Tensor:
    """Accepted length of each picture, the bonus counted."""
    prompts = list(ShapesWorld(seed + 1_010).batch(pictures).texts)
    target, parts = recipe.target, []
    for start in range(0, pictures, _BATCH):
        with torch.no_grad():
            prefix = target.prefix(prompts[start : start + _BATCH], recipe.law.guided)
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(prefix.images)]
        source = TreeSource(drafter, named_tree(tree), sampled=True)
        decoded = decode_speculative(target, source, Exact(), prefix, recipe.law, generators)
        parts.append((target.num_tokens - 1) / decoded.rounds.double())
    return torch.cat(parts)


def _summary(lengths: Tensor, base: Tensor) -> dict[str, float]:
    difference = lengths - base
    return {
        "accepted_length": float(lengths.mean()),
        "difference": float(difference.mean()),
        "stderr": float(difference.std() / len(difference) ** 0.5),
    }
