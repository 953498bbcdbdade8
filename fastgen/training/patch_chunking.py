"""Recipe `dc-patch`: a Z-Image learns to drop patches, starting from the dense model.

The transformer of a trained pipeline is upcycled on its own patch grid: at first it keeps all patches and computes the
same function. The original's velocity is the target. The share of kept patches falls from one to 1 / N during
training. Every sample keeps its most probable patches, exactly that share, or fewer with a tail drop: with a
threshold, an untrained router would keep all or none. The threshold is fitted at the same time, separately for each
noise level, so that the natural set has the same share and the router cannot save patches at the noise levels that
decide the layout.

Samples of a batch have separate budgets (multi-budget training), and those without a caption, the unconditional branch
of guidance, learn to work with as few patches as the floor (Lite-CFG).
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
"""Samples of similar noise level over which the share is fitted."""
HELD_OUT = 128
"""Most items whose latents define the metric."""
_HELD_OUT_START = 10_000_000
_METRIC_TOKENS = 32_768  # enough for the covariance of a patch
_LEVEL_WEIGHT = 0.1
_COST_WEIGHT = 0.1


def annealed(item: int, anneal: int) -> float:
    """Progress of dropping at an item: rises from 0 to 1 over the first `anneal` items.

    There is no delay: without dropped patches there is no error to learn from, and both optimizers would amplify
    rounding errors to full steps.
    """
    return min(1.0, item / max(1, anneal))


def token_budgets(
    progress: float, dropped: Tensor, compression: float, least: int, patches: int, generator: torch.Generator
) -> list[int]:
    """Number of patches to keep in each sample.

    Args:
        progress: see `annealed`; at 0 all are kept.
        dropped: bool [n], samples with a dropped caption: half of them keep `least` at progress 1.
        compression: N; the others keep one in N, minus a tail drop from `BUDGETS`.
        least: minimum patches per sample.
        patches: of a whole sample.
        generator: for the tail drops.
    """
    tails = torch.tensor(BUDGETS)[torch.randint(len(BUDGETS), dropped.shape, generator=generator)]
    targets = (1 - tails) / compression
    lite = dropped & (torch.rand(dropped.shape, generator=generator) < 0.5)
    targets = torch.where(lite, 0.0, targets).clamp(min=least / patches)
    return [max(least, round(patches * (1 - progress * (1 - target)))) for target in targets.tolist()]


def level_loss(probabilities: Tensor, sigma: Tensor, share: float, band: int = BAND) -> Tensor:
    """Moves the threshold so that it keeps `share` of the patches at every noise level: the squared logit of the last
    patch to keep, in bands of samples sorted by noise level.

    Unlike the ratio loss it does not depend on single patches, and is small only if the share is right.

    Args:
        probabilities: [n, L].
        sigma: [n].
        share: in (0, 1]; at 1 nothing is dropped and the loss is 0.
        band: samples per band; the last one may be smaller.
    """
    if share >= 1:
        return probabilities.new_zeros(())
    logits = torch.logit(probabilities[sigma.argsort()], eps=1e-6)
    edges = [part.flatten().quantile(1 - share) for part in logits.split(band)]
    return torch.stack(edges).square().mean()


def drop_cost_loss(chunks: Chunks, error: Tensor) -> Tensor:
    """Raises the probability of dropped patches with a larger error than the other dropped ones of their sample, and
    lowers that of those with a smaller error.

    Args:
        chunks: kept patches.
        error: squared error of each patch [n, L]; detached.
    """
    dropped = (~chunks.mask).to(error.dtype)
    count = dropped.sum(dim=1, keepdim=True).clamp(min=1)
    error = error.detach()
    mean = (error * dropped).sum(dim=1, keepdim=True) / count
    missed = (error / mean.clamp(min=1e-6) - 1).clamp(max=3)
    return -(missed * dropped * chunks.probabilities / count).sum(dim=1).mean()


class PatchRecipe(UpcyclingRecipe):
    """Learns the velocity of the pipeline's own transformer with fewer and fewer patches.

    Args:
        seed: seed of the new parts and of the data.
        pipeline: a trained `ZImagePipeline`, or its folder: the teacher, its VAE and its text encoder.
        init: folder of an upcycled transformer to continue from; None upcycles the pipeline's.
        anneal: items over which the share falls, at least 0.
        cost: weight of `drop_cost_loss`, at least 0.
        samples: training data; None renders ShapesWorld, which the pipeline must have been trained on.
        scaffold: configuration of a new scaffold, where it differs from `SCAFFOLD`.

    Raises:
        FastgenError: `init` has another grid, a number is out of range, or the scaffold has another grid.
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
                f"recipe {self.name}: {scaffold} is not allowed, needs grid 'patch', and no settings with --init"
            )
        if init is not None:
            student_for(init, self.name)
        self.anneal, self.cost = anneal, cost
        self.defaults: dict[str, Any] | None = None  # set if the whole pipeline is exported
        if samples is None:
            pipeline, self.defaults = load_z_image(pipeline)
            samples = Renders(seed + 1212, int(self.defaults.get("height", 64)))
        super().__init__(seed, pipeline, samples, init, **({} if init is not None else {**SCAFFOLD, **scaffold}))
        self.pipe, self.transformer = pipeline, self.student
        if self.defaults is not None:  # noise levels of the teacher's training, at its size
            self.family.logit_mean = LOGIT_MEAN + math.log((samples.size or 64) / 64)  # type: ignore[attr-defined]
        self._metric: TokenMetric | None = None

    def frozen_names(self) -> set[str]:
        return set()

    def budget(self, items: list[int], dropped: Tensor, generators: list[torch.Generator]) -> dict[str, Any]:
        """The share to keep in each item's group, and the number of patches to keep in each item."""
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
        """Patches of a whole item."""
        if self.samples.size is None:  # latents
            return math.prod(self.samples.batch(0, 1)[0].shape[-2:]) // PATCH**2
        return (self.samples.size // (self.pipe.vae_scale_factor * PATCH)) ** 2

    def metric(self, device: torch.device) -> TokenMetric:
        """The metric of errors, from latents of a few items outside a short run's data."""
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
        """Squared error against the teacher's velocity, and the cost of dropped patches."""
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
        """The loss of the threshold, in each group of items."""
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
        """Save the transformer in half precision; for ShapesWorld pipelines, the whole pipeline."""
        if self.defaults is None:
            super().export(module, folder, record)
            return
        save_pipeline(folder, self.pipe, self.defaults, half_copy(self.student))
        write_record(folder, self.name, record)
