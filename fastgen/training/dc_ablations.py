"""Which parts of dynamic chunking matter: the small model trained with one of them changed at a time.

All variants see the same pictures, noise and tail drops and are judged on the same held-out renders: error of the
velocity, plain and weighted as in training, at several tail drops; the share the router keeps; how much likelier it
keeps object boundaries than background.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastgen.accounting import account, count_flops
from fastgen.environment import environment
from fastgen.errors import FastgenError
from fastgen.evaluation.router_statistics import router_statistics
from fastgen.training.dc_z_image import DCRecipe
from fastgen.training.engine import Trainer
from fastgen.training.flow_matching import encode_latents, flow_matching_batch
from fastgen.training.recipes import train_config
from fastgen.training.z_image import text_features

#: What is changed: arguments of the recipe. The last is what all of them replace.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "cosine router": {"router": "cosine"},
    "center tap": {"center_tap": True},
    "residual gate: mask": {"residual_gate": "mask"},
    "no smoothing": {"smoothing": None},
    "one budget": {"warm_up": 2**62},
    "two scaffold blocks": {"scaffold_blocks": 2},
    "scaffold of D / 4, two blocks": {"scaffold_dim": None, "scaffold_blocks": 2},
    "keep a third": {"compression": 3.0},
    "no teacher": {"teacher": False},
    "dense": {"dense": True},
}
TAIL_DROPS = (0.0, 0.3, 0.6)
_HELD_OUT = 30_000_000
_BATCH = 32


def benchmark_dc_ablations(
    pipeline: Path,
    folder: Path,
    *,
    steps: int = 600,
    batch_size: int = 32,
    seed: int = 0,
    variants: Sequence[str] | None = None,
    renders: int = 256,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train and compare.

    Args:
        pipeline: folder of the `ZImagePipeline` that gives VAE and text encoder.
        folder: of the trained variants; a killed run continues there.
        steps, batch_size, seed: of training; a fifth of it is the warm-up with one budget.
        variants: names from `VARIANTS`; None takes all.
        renders: held-out pictures.
        report: told what is going on.

    Returns:
        a JSON-ready dict: "environment", "settings" and "rows" with variant, changes, per tail drop the errors and
        the paired difference of the weighted error to the first row with its standard error, FLOPs of a forward pass
        of the transformer and picture without tail drop, the natural kept share and the ratio of boundary to
        background probability.

    Raises:
        FastgenError: unknown variant, or renders < 1.
    """
    chosen = list(VARIANTS) if variants is None else list(variants)
    if chosen[:1] == ["dense"]:
        raise FastgenError("variant: 'dense' cannot be the first, which the others are compared with")
    if unknown := [name for name in chosen if name not in VARIANTS]:
        raise FastgenError(f"variant: {unknown[0]!r} is unknown, needs one of {', '.join(VARIANTS)}")
    if renders < 1:
        raise FastgenError(f"renders: {renders} is not allowed, needs an integer >= 1")
    rows: list[dict[str, Any]] = []
    base: dict[str, torch.Tensor] = {}
    for name in chosen:
        report(name)
        changes = {"warm_up": steps * batch_size // 5, **VARIANTS[name]}
        place = folder / name.replace(" ", "-").replace(":", "").replace("/", "")
        settings = {"steps": steps, "batch_size": batch_size, "seed": seed, "warmup": steps // 10, "accumulate": 1}
        Trainer(DCRecipe(seed, pipeline, **changes), train_config("dc", place, **settings)).run()
        # The exported model, which holds the averaged weights.
        is_dense = "dense" in changes
        recipe = DCRecipe(seed, pipeline, init=place / "model" / "transformer", dense=is_dense, teacher=False)
        drops = TAIL_DROPS[:1] if is_dense else TAIL_DROPS
        errors, flops = _errors(recipe, drops, renders, seed)
        base = base or {rho: values["weighted"] for rho, values in errors.items()}
        router: dict[str, Any] = {}
        if not is_dense:
            recipe.pipe.register_modules(transformer=recipe.transformer.eval())
            router = router_statistics(recipe.pipe, renders, seed)
        rows.append(
            {
                "variant": name,
                "changes": VARIANTS[name],
                "tail_drops": {
                    rho: {
                        **{kind: float(error.mean()) for kind, error in values.items()},
                        **_compared(values["weighted"], base.get(rho)),
                    }
                    for rho, values in errors.items()
                },
                "flops": flops,
                "kept": sum(row["kept"] for row in router["rows"]) / len(router["rows"]) if router else None,
                "boundary_to_background": router.get("boundary_to_background"),
            }
        )
    return {
        "benchmark": "dc-ablations",
        "environment": environment(),
        "settings": {"steps": steps, "batch_size": batch_size, "seed": seed, "renders": renders},
        "rows": rows,
    }


def _compared(errors: torch.Tensor, base: torch.Tensor | None) -> dict[str, float]:
    """Mean paired difference to the first row, with its standard error."""
    if base is None:
        return {}
    difference = errors - base
    return {"difference": float(difference.mean()), "stderr": float(difference.std() / len(errors) ** 0.5)}


@torch.no_grad()
def _errors(
    recipe: DCRecipe, tail_drops: Sequence[float], renders: int, seed: int
) -> tuple[dict[str, dict[str, torch.Tensor]], float]:
    """Plain and weighted error of the velocity of each held-out render at each tail drop, at noise levels drawn as in
    training; and FLOPs of the transformer for a picture at the first of them."""
    transformer = recipe.transformer.eval()
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {f"{rho:g}": [] for rho in tail_drops}
    flops = 0
    for start in range(0, renders, _BATCH):
        size = min(_BATCH, renders - start)
        # Captions are dropped and noise is drawn by this generator: the same for all variants and tail drops.
        generator = torch.Generator().manual_seed(seed + start)
        batch = recipe.batch(_HELD_OUT + start, size, generator)
        noisy, sigma, target = flow_matching_batch(encode_latents(recipe.vae, batch["images"], generator), generator)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        captions = [
            row[:length] for row, length in zip(text_features(recipe.text_encoder, batch), lengths, strict=True)
        ]
        images = list(noisy[:, :, None].unbind(0))
        for number, rho in enumerate(tail_drops):
            knobs = {} if recipe.dense else {"tail_drop": rho}
            with account() as stats, count_flops():
                output = transformer(images, 1 - sigma, captions, **knobs)
            flops += 0 if number else stats.flops
            difference = torch.stack(list(output.sample)).squeeze(2) - target
            plain = difference.square().mean(dim=(1, 2, 3))
            found[f"{rho:g}"].append((plain, recipe.metric(difference, sigma)))
    errors = {
        rho: {"velocity": torch.cat([plain for plain, _ in parts]), "weighted": torch.cat([own for _, own in parts])}
        for rho, parts in found.items()
    }
    return errors, flops / renders
