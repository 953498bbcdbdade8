"""Recipe `dc-patch`: a Z-Image learns to drop patches, beginning as itself.

The transformer of a trained pipeline is upcycled on its own patch grid, where it keeps everything and computes what it
computed before. Its own velocity is the target throughout. The share of patches that are kept falls from one to 1 / N
while it learns. Every sample keeps its likeliest ones, exactly as many as that share, or fewer where a tail drop was
drawn: a threshold would let a router that cannot tell them apart yet keep all or none. The threshold is fitted beside
it, for every noise level by itself, so that the natural set has the share too and the router cannot save where the
picture is laid out.

Samples of one batch have budgets of their own (multi-budget training), and those without a caption, the unconditional
branch of guidance, learn to do with as few as the floor (Lite-CFG).
"""

from __future__ import annotations

import math
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.checks import check_integer, check_number
from fastgen.errors import FastgenError
from fastgen.models.chunking import Chunks
from fastgen.models.patch_grid import PATCH
from fastgen.models.z_image_batch import patchify
from fastgen.training.cards import write_record
from fastgen.training.families import Noisy
from fastgen.training.flow_matching import LOGIT_MEAN, TokenMetric
from fastgen.training.pictures import Renders, TrainingData
from fastgen.training.upcycling import BUDGETS, GROUP, UpcyclingRecipe, half_copy, item_generator
from fastgen.training.upcycling_checks import student_for
from fastgen.training.z_image import load_z_image, save_pipeline

__all__ = ["PatchRecipe", "annealed", "drop_cost_loss", "level_loss", "token_budgets"]

SCAFFOLD: dict[str, Any] = {"grid": "patch", "compression": 4.0, "floor": 0.125}
BAND = 4
"""Samples of neighbouring noise levels that keep the wanted share together."""
HELD_OUT = 128
"""Most items whose latents give the metric."""
_HELD_OUT_START = 10_000_000
_METRIC_TOKENS = 32_768  # enough for the covariance of a patch
_LEVEL_WEIGHT = 0.1
_COST_WEIGHT = 0.1


def annealed(item: int, anneal: int) -> float:
    """How far dropping has come with an item: rises from 0 to 1 over the first `anneal`.

    It begins at once: while nothing is dropped there is no error to learn from, and both optimizers would scale mere
    rounding up to full steps.
    """
    return min(1.0, item / max(1, anneal))


def token_budgets(
    progress: float, dropped: Tensor, compression: float, least: int, patches: int, generator: torch.Generator
) -> list[int]:
    """Patches to keep in each sample.

    Args:
        progress: see `annealed`; at 0 all are kept.
        dropped: bool [n], samples whose caption was dropped: half of them keep `least` at progress 1.
        compression: N; the others keep one in N, less a tail drop of `BUDGETS`.
        least: fewest patches of a sample.
        patches: of a whole sample.
        generator: draws the tail drops.
    """
    tails = torch.tensor(BUDGETS)[torch.randint(len(BUDGETS), dropped.shape, generator=generator)]
    targets = (1 - tails) / compression
    lite = dropped & (torch.rand(dropped.shape, generator=generator) < 0.5)
    targets = torch.where(lite, 0.0, targets).clamp(min=least / patches)
    return [max(least, round(patches * (1 - progress * (1 - target)))) for target in targets.tolist()]


def level_loss(probabilities: Tensor, sigma: Tensor, share: float, band: int = BAND) -> Tensor:
    """Moves the threshold to where it keeps `share` of the patches at every noise level: the square of the logit that
    just so belongs to them, in bands of samples sorted by noise level.

    Unlike the ratio loss it says nothing about single patches, and is small only where the share is right.

    Args:
        probabilities: [n, L].
        sigma: [n].
        share: in (0, 1]; at 1 nothing is to be dropped and the loss is 0.
        band: samples of a band; the last one may be smaller.
    """
    if share >= 1:
        return probabilities.new_zeros(())
    logits = torch.logit(probabilities[sigma.argsort()], eps=1e-6)
    edges = [part.flatten().quantile(1 - share) for part in logits.split(band)]
    return torch.stack(edges).square().mean()


def drop_cost_loss(chunks: Chunks, error: Tensor) -> Tensor:
    """Raises the probability of dropped patches that were missed more than the others of their sample, and lowers that
    of those that were missed less.

    Args:
        chunks: what was kept.
        error: squared error of each patch [n, L]; no gradient reaches it.
    """
    dropped = (~chunks.mask).to(error.dtype)
    count = dropped.sum(dim=1, keepdim=True).clamp(min=1)
    error = error.detach()
    mean = (error * dropped).sum(dim=1, keepdim=True) / count
    missed = (error / mean.clamp(min=1e-6) - 1).clamp(max=3)
    return -(missed * dropped * chunks.probabilities / count).sum(dim=1).mean()


class PatchRecipe(UpcyclingRecipe):
    """Learns the velocity of the pipeline's own transformer with ever fewer patches.

    Args:
        seed: seed of the new parts and of the data.
        pipeline: a trained `ZImagePipeline`, or the folder of one: the teacher, its VAE and its text encoder.
        init: folder of an upcycled transformer to go on from; None upcycles the pipeline's.
        anneal: items over which the wanted share falls, at least 0.
        cost: weight of `drop_cost_loss`, at least 0.
        samples: what to learn from; None renders ShapesWorld, which a pipeline in a folder has to know.
        scaffold: configuration of a new scaffold where it is not `SCAFFOLD`.

    Raises:
        FastgenError: `init` has another grid, a number is out of range, or the scaffold is not one of that grid.
    """

    name = "dc-patch"

    def __init__(
        self,
        seed: int,
        pipeline: Any,
        init: Path | None = None,
        anneal: int = 16_000,
        cost: float = _COST_WEIGHT,
        samples: TrainingData | None = None,
        **scaffold: Any,
    ) -> None:
        check_integer("anneal", anneal, 0)
        check_number("cost", cost, 0)
        if scaffold.get("grid", "patch") != "patch" or (init is not None and scaffold):
            raise FastgenError(
                f"recipe {self.name}: {scaffold} cannot be chosen, needs grid 'patch', and none with --init"
            )
        if init is not None:
            student_for(init, self.name)
        self.anneal, self.cost = anneal, cost
        self.defaults: dict[str, Any] | None = None  # of a pipeline that is exported whole
        if samples is None:
            pipeline, self.defaults = load_z_image(pipeline)
            samples = Renders(seed + 1212, int(self.defaults.get("height", 64)))
        super().__init__(seed, pipeline, samples, init, **({} if init is not None else {**SCAFFOLD, **scaffold}))
        self.pipe, self.transformer = pipeline, self.student
        if self.defaults is not None:  # noise levels of the teacher's own training, at its size
            self.family.logit_mean = LOGIT_MEAN + math.log((samples.size or 64) / 64)  # type: ignore[attr-defined]
        self._metric: TokenMetric | None = None

    def frozen_names(self) -> set[str]:
        return set()

    def budget(self, items: list[int], dropped: Tensor, generators: list[torch.Generator]) -> dict[str, Any]:
        """The share that each item's group is to keep, and how many patches of each."""
        config, patches = self.student.config, self.patches
        least = max(1, math.ceil(config.floor * patches - 1e-9))
        shares, budgets = [], []
        for index, item in enumerate(items):
            progress = annealed(item // GROUP * GROUP + GROUP, self.anneal)
            shares.append(1 - progress * (1 - 1 / config.compression))
            own = dropped[index : index + 1], config.compression, least, patches, generators[index]
            budgets += token_budgets(progress, *own)
        return {"share": shares, "token_budget": budgets}

    @cached_property
    def patches(self) -> int:
        """Of a whole item."""
        if self.samples.size is None:  # latents
            return math.prod(self.samples.batch(0, 1)[0].shape[-2:]) // PATCH**2
        return (self.samples.size // (self.pipe.vae_scale_factor * PATCH)) ** 2

    def metric(self, device: torch.device) -> TokenMetric:
        """How errors count, by latents of a few items that no short run learns from."""
        if self._metric is None:
            count = max(1, min(HELD_OUT, _METRIC_TOKENS // self.patches))
            values, _ = self.samples.batch(_HELD_OUT_START, count)
            values = values.to(device)
            generators = [item_generator(self.seed, index, 2) for index in range(count)]
            self._metric = TokenMetric(
                values if values.is_floating_point() else self.family.encode(values, generators)
            )
        return self._metric

    def stage_loss(
        self, prediction: Tensor, output: Any, noisy: Noisy, conditions: dict[str, Any]
    ) -> tuple[Tensor, dict[str, float]]:
        """Squared error against the teacher's velocity, and the cost of what was dropped."""
        target = self.family.teach(noisy, conditions).prediction.float()
        sigma = 1 - noisy.level
        error, numbers = self.metric(target.device).loss(prediction, target, sigma)
        missed = patchify((prediction.float() - target).detach()).square().mean(dim=-1)
        noisiest = sigma >= sigma.median()
        kept = output.chunks.natural.float().mean(dim=1)
        numbers |= {
            "kept_noisy": float(kept[noisiest].mean()),
            "kept_clean": float(kept[~noisiest].mean()) if not bool(noisiest.all()) else float("nan"),
        }
        return error + self.cost * drop_cost_loss(output.chunks, missed), numbers

    def router_loss(self, chunks: Chunks, noisy: Noisy, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """The threshold's place, in each group of items."""
        sigma, shares = 1 - noisy.level, batch["share"]
        sizes = [len([*own]) for _, own in groupby(batch["items"], lambda item: item // GROUP)]
        level, first = sigma.new_zeros(()), 0
        for size in sizes:
            own = slice(first, first + size)
            level = level + level_loss(chunks.probabilities[own], sigma[own], shares[first]) * (size / len(sigma))
            first += size
        numbers = {
            "level": float(level.detach()),
            "share": sum(shares) / len(shares),
            "kept": float(chunks.natural.float().mean()),
            "tokens": sum(batch["token_budget"]) / len(sigma),
        }
        return _LEVEL_WEIGHT * level, numbers

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Save the transformer in half precision; with it the whole pipeline where that draws ShapesWorld."""
        if self.defaults is None:
            super().export(module, folder, record)
            return
        save_pipeline(folder, self.pipe, self.defaults, half_copy(self.student))
        write_record(folder, self.name, record)
