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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.checks import check_integer, check_number
from fastgen.data.shapes import ShapesWorld
from fastgen.errors import FastgenError
from fastgen.models.chunking import Chunks
from fastgen.models.dc_z_image import DCZImageTransformer2DModel
from fastgen.models.upcycle import upcycle
from fastgen.models.z_image_batch import forward_batch, patchify, use_real_rotary
from fastgen.pretrained import load_pretrained
from fastgen.training.cards import write_record
from fastgen.training.dc_z_image import BUDGETS
from fastgen.training.flow_matching import TokenMetric, encode_latents, flow_matching_batch
from fastgen.training.z_image import caption_tokens, save_pipeline, text_features

__all__ = ["PatchRecipe", "annealed", "drop_cost_loss", "level_loss", "token_budgets"]

SCAFFOLD: dict[str, Any] = {"grid": "patch", "compression": 4.0, "floor": 0.125}
BAND = 4
"""Samples of neighbouring noise levels that keep the wanted share together."""
HELD_OUT = 128
"""Fresh renders whose latents give the metric."""
_LEVEL_WEIGHT = 0.1
_COST_WEIGHT = 0.1
_CAPTION_DROPOUT = 0.1


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


class PatchModule(torch.nn.Module):
    """What is trained: the upcycled transformer."""

    adamw_names = ("scaffold", "adaptor", "t_embedder", "cap_embedder", "adaLN")
    compiled_shapes = None  # the number of kept tokens is another one in every batch

    def __init__(self, transformer: DCZImageTransformer2DModel) -> None:
        super().__init__()
        groups = ("context_refiner", "noise_refiner", "layers", "last_layers")
        blocks = {group: len(getattr(transformer, group)) for group in groups}
        self.compiled_parts = [f"transformer.{group}.{i}" for group, n in blocks.items() for i in range(n)]
        self.transformer = transformer

    def forward(
        self, latents: Tensor, timestep: Tensor, captions: list[Tensor], token_budget: list[int]
    ) -> tuple[Tensor, Chunks]:
        """Velocity [n, C, h, w], and what was kept."""
        images = list(latents[:, :, None].unbind(0))
        output = self.transformer(images, timestep, captions, token_budget=token_budget, output_chunks=True)
        velocity = torch.cat(output.sample, dim=1).transpose(0, 1)
        # Where no patch is dropped, nothing asks for its neighbour's share; processes wait for gradients of all.
        share: Any = self.transformer.scaffold.share
        unused: Tensor = sum(parameter.sum() for parameter in share.parameters())
        return velocity + 0.0 * unused, output.chunks


class PatchRecipe:
    """Learns the velocity of the pipeline's own transformer with ever fewer patches.

    Args:
        seed: seed of the new parts and of the data.
        pipeline: folder of a trained `ZImagePipeline` for ShapesWorld: the teacher, its VAE and its text encoder.
        init: folder of an upcycled transformer to go on from; None upcycles the pipeline's.
        anneal: items over which the wanted share falls, at least 0.
        cost: weight of `drop_cost_loss`, at least 0.
        scaffold: configuration of a new scaffold where it is not `SCAFFOLD`.

    Raises:
        FastgenError: `init` has another grid, a number is out of range, or the scaffold is not one of that grid.
    """

    name = "dc-patch"

    def __init__(
        self,
        seed: int,
        pipeline: Path,
        init: Path | None = None,
        anneal: int = 16_000,
        cost: float = _COST_WEIGHT,
        **scaffold: Any,
    ) -> None:
        from diffusers import ZImagePipeline

        from fastgen.io import read_object

        check_integer("anneal", anneal, 0)
        check_number("cost", cost, 0)
        if scaffold.get("grid", "patch") != "patch" or (init is not None and scaffold):
            raise FastgenError(
                f"recipe {self.name}: {scaffold} cannot be chosen, needs grid 'patch', and none with --init"
            )
        self.anneal, self.cost = anneal, cost
        pipe = load_pretrained(ZImagePipeline, pipeline, torch_dtype=torch.float32)
        defaults = pipeline / "fastgen.json"
        self.defaults = read_object(defaults) if defaults.is_file() else {}
        self.teacher: Any = pipe.transformer.eval().requires_grad_(False)
        torch.manual_seed(seed)
        if init is None:
            made: Any = upcycle(self.teacher, **{**SCAFFOLD, **scaffold})
        else:
            made = load_pretrained(DCZImageTransformer2DModel, init)
            if made.config.grid != "patch":
                raise FastgenError(f"--init: {init} has grid {made.config.grid!r}, recipe {self.name} needs 'patch'")
        self.transformer: DCZImageTransformer2DModel = made
        use_real_rotary(self.teacher)
        pipe.register_modules(transformer=None)
        self.pipe = pipe
        self.vae = pipe.vae.eval().requires_grad_(False)
        self.text_encoder = pipe.text_encoder.eval().requires_grad_(False)
        self.size = int(self.defaults.get("height", 64))
        self.data = ShapesWorld(seed + 1212, size=self.size)
        images = torch.from_numpy(self.data.batch(HELD_OUT, 10_000_000).images)
        self.metric = TokenMetric(encode_latents(self.vae, images, torch.Generator().manual_seed(seed)))

    def build(self) -> PatchModule:
        """The upcycled transformer."""
        return PatchModule(self.transformer.train())

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Renders, their tokenised captions (some dropped), the wanted share, and how many patches of each to keep."""
        data = self.data.batch(size, start)
        dropped = torch.rand(size, generator=generator) < _CAPTION_DROPOUT
        texts = ["" if drop else text for drop, text in zip(dropped.tolist(), data.texts, strict=True)]
        compression = self.transformer.config.compression
        progress = annealed(start + size, self.anneal)
        patches = (self.size // 8) ** 2
        least = max(1, math.ceil(self.transformer.config.floor * patches - 1e-9))
        return {
            "images": torch.from_numpy(data.images),
            **caption_tokens(self.pipe.tokenizer, texts),
            "share": 1 - progress * (1 - 1 / compression),
            "token_budget": token_budgets(progress, dropped, compression, least, patches, generator),
        }

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Squared error against the teacher's velocity, the threshold's place, and the cost of what was dropped."""
        latents = encode_latents(self.vae, batch["images"], generator)
        # Noise levels of the teacher's own training, at its size.
        noisy, sigma, _ = flow_matching_batch(latents, generator, 1.2 + torch.tensor(self.size / 64).log().item())
        lengths = batch["attention_mask"].sum(dim=1)
        features = text_features(self.text_encoder, batch)
        with torch.no_grad():
            target = forward_batch(self.teacher.to(noisy.device), noisy, 1 - sigma, features, lengths)[0].float()
        captions = [row[:length] for row, length in zip(features, lengths.tolist(), strict=True)]
        output, chunks = module(noisy, 1 - sigma, captions, batch["token_budget"])
        error, numbers = self.metric.loss(output, target, sigma)
        level = level_loss(chunks.probabilities, sigma, batch["share"])
        missed = patchify((output.float() - target).detach()).square().mean(dim=-1)
        cost = drop_cost_loss(chunks, missed)
        noisiest = sigma >= sigma.median()
        kept = chunks.natural.float().mean(dim=1)
        numbers |= {
            "level": float(level.detach()),
            "share": batch["share"],
            "kept": float(kept.mean()),
            "kept_noisy": float(kept[noisiest].mean()),
            "kept_clean": float(kept[~noisiest].mean()) if not bool(noisiest.all()) else float("nan"),
            "tokens": sum(batch["token_budget"]) / len(sigma),
        }
        return error + _LEVEL_WEIGHT * level + self.cost * cost, numbers

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Save a whole pipeline in half precision."""
        save_pipeline(folder, self.pipe, self.defaults, self.transformer)
        write_record(folder, self.name, record)
