"""Recipe `verifier`: the yes/no model of ShapesWorld, from renders with captions that are true and false of them.

It sees neither the checker that scores pictures nor anything that a generator drew. What it has to expect of generated
pictures and of previews is made from renders: blur, noise, colour shifts, the autoencoder's losses, blobs and strong
texture in the place of objects, and two scenes at once.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.data.captions import vocabulary
from fastgen.data.distractors import with_distractors
from fastgen.data.shapes import ShapesWorld
from fastgen.data.statements import false_caption, is_true, true_caption
from fastgen.models.shapes_verifier import ShapesVerifier, numbered, word_ids
from fastgen.training.cards import write_record
from fastgen.training.detector import augment
from fastgen.training.vae import to_pixels

_EMPTY, _MIXED = 0.12, 0.3  # shares of pictures without objects, and with blobs beside their objects
_DOUBLE = 0.12  # share of pictures that are two scenes at once: neither caption is true
FALSE = 3  # false captions of a picture, beside a true one


class VerifierRecipe:
    """Binary cross-entropy over one true caption, false ones that differ in one thing, and another picture's.

    Args:
        seed: seed of weights and data.
        vae: an autoencoder whose losses a part of the pictures goes through; None leaves that out.
    """

    name = "verifier"

    def __init__(self, seed: int = 0, vae: torch.nn.Module | None = None) -> None:
        self.data = ShapesWorld(seed + 606, held_out=False)
        self.vae: Any = None if vae is None else vae.eval().requires_grad_(False)
        self.ids = numbered(vocabulary())

    def build(self) -> ShapesVerifier:
        """The verifier with fresh weights."""
        return ShapesVerifier(vocabulary()).to(memory_format=torch.channels_last)

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Pictures, captions [n, FALSE + 2, words], and which of them are true [n, FALSE + 2]; NaN: nobody knows."""
        seed = int(torch.randint(2**62, (), generator=generator))
        rng, chance = np.random.default_rng(seed), random.Random(seed)
        drawn = self.data.batch(size, start)
        data = with_distractors(drawn, rng, empty=_EMPTY, mixed=_MIXED)
        texts, truth = [], []
        for index, (caption, scene, before) in enumerate(zip(data.captions, data.scenes, drawn.scenes, strict=True)):
            other = data.captions[(index + 1) % size]
            captions = [true_caption(caption, before, chance)]
            captions += [false_caption(caption, before, chance) for _ in range(FALSE)]
            known = is_true(other, scene) if size > 1 else None
            # Where the objects were taken out, nothing is true.
            right = [float(len(scene) > 0), *[0.0] * FALSE, float("nan") if known is None else float(known)]
            texts += [one.text for one in (*captions, other)]
            truth.append(right)
        tokens = word_ids(texts, self.ids).unflatten(0, (size, -1))
        return {"images": torch.from_numpy(data.images), "tokens": tokens, "truth": torch.tensor(truth)}

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy; the true caption counts as much as the false ones together."""
        pixels, truth = self._spoil(to_pixels(batch["images"]), batch["truth"], generator)
        logits = module(pixels, batch["tokens"]).float()
        known = ~truth.isnan()
        weight = torch.where(truth == 1, float(FALSE), 1.0)[known]
        each = F.binary_cross_entropy_with_logits(logits[known], truth[known], reduction="none")
        right = ((logits[known] > 0) == (truth[known] == 1)).float()
        numbers = {"accuracy": float((right * weight).sum() / weight.sum())}
        return (each * weight).sum() / weight.sum(), numbers

    def _spoil(self, pixels: Tensor, truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures as generators and previews make them."""
        n = len(pixels)
        double = (torch.rand(n, generator=generator) < _DOUBLE).to(pixels.device)
        share = (0.35 + 0.3 * torch.rand(n, 1, 1, 1, generator=generator)).to(pixels)
        mixed = share * pixels + (1 - share) * pixels.roll(1, dims=0)
        pixels = torch.where(double[:, None, None, None], mixed, pixels)
        truth = torch.where(double[:, None], torch.where(truth.isnan(), truth, 0.0), truth)
        if self.vae is not None:
            half = n // 2
            self.vae.to(pixels.device)
            with torch.no_grad():
                mean = self.vae.encoder(pixels[:half]).chunk(2, dim=1)[0]
                level = 0.4 * torch.rand(half, 1, 1, 1, generator=generator).to(pixels).square()
                noise = torch.randn(mean.shape, generator=generator).to(mean)
                lossy = self.vae.decoder(mean + level * mean.std() * noise).to(pixels).clamp(-1, 1)
            pixels = torch.cat([lossy, pixels[half:]])
        order = torch.randperm(n, generator=generator).to(pixels.device)  # blur falls on any of them
        pixels = torch.empty_like(pixels).index_copy(0, order, augment(pixels[order], generator))
        return pixels, truth

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Save the verifier to `folder` in half precision."""
        copy.deepcopy(module).to(torch.float16).save_pretrained(folder)  # type: ignore[operator]
        write_record(folder, self.name, record)
