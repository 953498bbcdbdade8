"""Estimated cost of upcycling a Z-Image: `python -m fastgen.training.upcycling_cost --help`.

A forward pass costs 2 FLOPs per weight and token, and 4 T^2 D per block for attention. Training costs the same again
for the gradients of activations, for the gradients of trained weights, and for gradient checkpointing. Seconds are
FLOPs / (peak x utilisation): nothing here is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastgen.models.dc_z_image import DCZImageTransformer2DModel, Grid
from fastgen.models.upcycle import backbone_names
from fastgen.training.upcycling import BUDGETS

__all__ = ["Stage", "estimate"]

_TEXT_TOKENS = 64  # of a caption, padded
_MEAN_DROP = sum(BUDGETS) / len(BUDGETS)
_TRAINED_BYTES = 4 + 4 + 8 + 4  # weight, gradient, both moments of AdamW, average
_FROZEN_BYTES = 4  # of the student's frozen weights, in float32
_TEXT_ENCODER = 4.0e9  # parameters of Qwen3-4B, in bfloat16
#: Steps of the paper (arXiv 2603.06351, upcycling) for stages 1 and 2; `dc-patch` replaces both.
STEPS = {"dc-graft": 5_000, "dc-finetune": 10_000, "dc-patch": 10_000}


@dataclass(frozen=True)
class Stage:
    """Cost of a recipe.

    Attributes:
        flops: of the whole run.
        hours: GPU hours in total at that utilisation.
        gib: per GPU, without allocator overhead.
    """

    name: str
    flops: float
    hours: float
    gib: float


def forward_flops(model: DCZImageTransformer2DModel, side: int, kept: float) -> float:
    """FLOPs of a picture's forward pass.

    Args:
        model: on any device, the meta device too.
        side: patches of 2 x 2 per side.
        kept: tokens in the middle layers, as a share of the patches.
    """
    patches, dim = side * side, model.config.dim
    every = patches if model.config.grid == "patch" else kept * patches
    tokens: Mapping[str, float] = {
        "noise_refiner": every,
        "context_refiner": _TEXT_TOKENS,
        "layers": kept * patches + _TEXT_TOKENS,
        "last_layers": every + _TEXT_TOKENS,
        "scaffold": patches if model.config.grid == "patch" else 4 * patches,
    }
    total = 0.0
    for name, count in tokens.items():
        part: Any = getattr(model, name)
        weights = sum(p.numel() for n, p in part.named_parameters() if p.ndim > 1 and "adaLN" not in n)
        blocks = 0 if name == "scaffold" else len(part)
        total += 2 * weights * count + 4 * count**2 * dim * blocks
    return total


def estimate(
    gpus: int, peak: float, utilisation: float, pixels: int = 1024, batch: int = 64, pictures: int = 1
) -> list[Stage]:
    """Each recipe's cost for the published Z-Image shape.

    Args:
        gpus: number of GPUs, one process each.
        peak: bfloat16 FLOP/s per GPU.
        utilisation: share of the peak.
        pixels: side of a picture.
        batch: items per step on all GPUs.
        pictures: items in memory at a time per GPU (`--batch-size` / `--accumulate`).
    """
    found = []
    for name, steps in STEPS.items():
        grid: Grid = "patch" if name == "dc-patch" else "latent"
        with torch.device("meta"):
            model = DCZImageTransformer2DModel(grid=grid)
        side = pixels // 16
        all_weights = sum(p.numel() for p in model.parameters())
        copied = set(backbone_names(model))
        new = sum(p.numel() for n, p in model.named_parameters() if n not in copied)
        trained = new if name == "dc-graft" else all_weights
        drop = 0.0 if name == "dc-graft" else _MEAN_DROP
        # A quarter of the latent positions is kept, as many as the original has patches; or a quarter of the patches.
        kept = (1 - drop) * (0.25 if grid == "patch" else 1.0)
        own, teacher = forward_flops(model, side, kept), forward_flops(model, side, 1.0)
        passes = own * (3 if name == "dc-graft" else 4) + (0 if name == "dc-finetune" else teacher)
        flops = passes * batch * steps
        weights = (trained * _TRAINED_BYTES + (all_weights - trained) * _FROZEN_BYTES) / gpus
        whole = 2 * (_TEXT_ENCODER + (0 if name == "dc-finetune" else all_weights))
        tokens = side * side + _TEXT_TOKENS
        blocks = sum(len(getattr(model, part)) for part in ("noise_refiner", "layers", "last_layers"))
        # The residual stream before every block, and the activations of one recomputed block.
        activations = pictures * tokens * model.config.dim * (4 * blocks + 2 * 24)
        found.append(Stage(name, flops, flops / (peak * utilisation) / 3600, (weights + whole + activations) / 2**30))
    return found


def main(arguments: list[str] | None = None) -> str:
    """The table of the command line."""
    parser = argparse.ArgumentParser(description="Estimated cost of upcycling Z-Image; nothing is measured.")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--peak", type=float, default=989.0, help="bfloat16 TFLOP/s of one GPU (H100 SXM: 989)")
    parser.add_argument("--utilisation", type=float, default=0.4)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64, help="items per step on all GPUs")
    parser.add_argument("--pictures", type=int, default=1, help="items in memory at a time per GPU")
    given = parser.parse_args(arguments)
    stages = estimate(given.gpus, given.peak * 1e12, given.utilisation, given.pixels, given.batch, given.pictures)
    lines = ["| recipe | steps | EFLOPs | GPU hours | hours | GiB a GPU |", "|---|---|---|---|---|---|"]
    for stage in stages:
        lines.append(
            f"| {stage.name} | {STEPS[stage.name]:,} | {stage.flops / 1e18:.0f} | {stage.hours:.0f} | "
            f"{stage.hours / given.gpus:.1f} | {stage.gib:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(main())
