"""Recipe `verifier`: the yes/no model of ShapesWorld, trained on renders with true and false captions.

Its training data have neither verdicts of the checker nor generated pictures. Augmentations of renders imitate the
faults of generated pictures and previews: blur, noise, colour shifts, the autoencoder's losses, blobs and strong
texture instead of objects, and two overlaid scenes. Auxiliary losses cover shape and colour at each place, position
and number of each named object, and the offset of two named objects: from yes/no answers alone the model learns
objects late, and never left and right.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.data.captions import TASKS, vocabulary
from fastgen.data.distractors import with_distractors
from fastgen.data.scenes import IMAGE_SIZE, MAX_OBJECTS, SceneObject
from fastgen.data.shapes import COLORS, SHAPES, ShapesWorld
from fastgen.data.statements import false_caption, is_true, true_caption
from fastgen.models.shapes_verifier import ShapesVerifier, numbered, word_ids
from fastgen.training.cards import write_record
from fastgen.training.detector import augment, detection_targets
from fastgen.training.vae import to_pixels

_EMPTY, _MIXED = 0.12, 0.3  # shares of pictures without objects, and with blobs next to their objects
_DOUBLE = 0.12  # share of pictures with two overlaid scenes: neither caption is true
FALSE = 3  # false captions per true one


_NOUNS = {name + ending: name for name in SHAPES for ending in ("", "s", "es")}


class Read(NamedTuple):
    """Outputs of the network for pictures [n] and k prompts each."""

    answers: Tensor  # [n, k] logits of "yes"
    shapes: Tensor  # [n, places, 1 + shapes] logits of background and shapes
    colors: Tensor  # [n, places, colours]
    centres: Tensor  # [n, k, words, 2] x and y of the object that a word names, in [-1, 1]
    counts: Tensor  # [n, k, words, 1 + MAX_OBJECTS] logits of the number of such objects
    offsets: Tensor  # [n, k, 2] from the second to the first object that a prompt names


class _Supervised(nn.Module):
    """The verifier with auxiliary heads for training."""

    def __init__(self, verifier: ShapesVerifier) -> None:
        super().__init__()
        self.verifier = verifier
        width = verifier.config.width
        self.what = nn.Linear(width, 1 + len(SHAPES) + len(COLORS))
        self.named = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 + 1 + MAX_OBJECTS))
        self.apart = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, pixels: Tensor, tokens: Tensor) -> Read:
        picture = self.verifier.encode_picture(pixels)
        words, mask = self.verifier.encode_text(tokens.flatten(0, 1))
        states = self.verifier.fuse(words, mask, picture)
        answers = self.verifier.conclude(states[-1]).unflatten(0, tokens.shape[:2])
        shapes, colors = self.what(picture).split((1 + len(SHAPES), len(COLORS)), dim=-1)
        # One layer each: words find their objects, then the question token reads the words, then it answers.
        centres, counts = self.named(states[0]).unflatten(0, tokens.shape[:2]).split((2, 1 + MAX_OBJECTS), dim=-1)
        offsets = self.apart(states[min(1, len(states) - 1)][:, 0]).unflatten(0, tokens.shape[:2])
        return Read(answers, shapes, colors, centres, counts, offsets)


def _named(text: str, scene: Sequence[SceneObject], length: int) -> tuple[Tensor, Tensor]:
    """For each word of a tokenised text: the centre [length, 2] in [-1, 1] of the single object that it names (NaN:
    not exactly one), and the number of such objects [length] (-1: the word is not a noun)."""
    centres, counts = torch.full((length, 2), float("nan")), torch.full((length,), -1)
    words = text.split()
    for place, word in enumerate(words):
        if word not in _NOUNS:
            continue
        color = words[place - 1] if place and words[place - 1] in COLORS else None
        fitting = [thing for thing in scene if thing.shape == _NOUNS[word] and color in (None, thing.color)]
        counts[place + 1] = len(fitting)  # the question token is first
        if len(fitting) == 1:
            centres[place + 1] = torch.tensor([fitting[0].cx, fitting[0].cy]) * 2 / IMAGE_SIZE - 1
    return centres, counts


def _offset(centres: Tensor, counts: Tensor) -> Tensor:
    """Offset [2] from the second to the first named object, given `_named`'s results; NaN: not two single objects."""
    places = (counts >= 0).nonzero()[:, 0]
    return centres[places[0]] - centres[places[1]] if len(places) == 2 else torch.full((2,), float("nan"))


class VerifierRecipe:
    """Binary cross-entropy over one true caption, false ones that differ in one detail, and another picture's; plus
    auxiliary losses, see the module.

    Args:
        seed: seed of weights and data.
        vae: an autoencoder that reconstructs half of the pictures; None skips that.
    """

    name = "verifier"

    def __init__(self, seed: int = 0, vae: torch.nn.Module | None = None) -> None:
        self.data = ShapesWorld(seed + 606, held_out=False)
        self.vae: Any = None if vae is None else vae.eval().requires_grad_(False)
        self.ids = numbered(vocabulary())

    def build(self) -> nn.Module:
        """The verifier with new weights and its auxiliary heads."""
        return _Supervised(ShapesVerifier(vocabulary()).to(memory_format=torch.channels_last))

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Pictures, captions [n, FALSE + 2, words], their truth [n, FALSE + 2] (NaN: unknown), and at each place the
        shape [n, places] (0: none, -2: ignored) and the colour; see `_named` for the rest."""
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
            # Without objects, no caption is true.
            right = [float(len(scene) > 0), *[0.0] * FALSE, float("nan") if known is None else float(known)]
            texts += [one.text for one in (*captions, other)]
            truth.append(right)
        tokens = word_ids(texts, self.ids)
        tokens = tokens[:, : int((tokens > 0).sum(dim=1).max())].unflatten(0, (size, -1))
        scenes = [scene for scene in data.scenes for _ in range(tokens.shape[1])]
        named = [_named(text, scene, tokens.shape[2]) for text, scene in zip(texts, scenes, strict=True)]
        offsets = torch.stack([_offset(*pair) for pair in named]).unflatten(0, tokens.shape[:2])
        centres, counts = (torch.stack(part).unflatten(0, tokens.shape[:2]) for part in zip(*named, strict=True))
        places = detection_targets(data)
        owner = places["owner"]
        shapes = torch.where(owner < 0, torch.where(owner == -1, 0, owner), places["shapes"] + 1)
        return {
            "images": torch.from_numpy(data.images),
            "tokens": tokens,
            "truth": torch.tensor(truth),
            "shapes": shapes.flatten(1),
            "colors": places["colors"].flatten(1),
            "centres": centres,
            "counts": counts,
            "offsets": offsets,
            "task": torch.tensor([TASKS.index(caption.tag) for caption in data.captions]),
        }

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Sum of the losses; the true caption has the same weight as all false ones together."""
        pixels, truth, single = self._spoil(to_pixels(batch["images"]), batch["truth"], generator)
        read = Read(*(out.float() for out in module(pixels, batch["tokens"])))
        logits, shapes, colors = read.answers, read.shapes, read.colors
        known = ~truth.isnan()
        weight = torch.where(truth == 1, float(FALSE), 1.0)[known]
        each = F.binary_cross_entropy_with_logits(logits[known], truth[known], reduction="none")
        right = ((logits[known] > 0) == (truth[known] == 1)).float()
        answer = (each * weight).sum() / weight.sum()
        asked = (batch["shapes"] >= 0) & single[:, None]
        thing = asked & (batch["shapes"] > 0)
        # Most places are background; sums, not means, over places with an object: a small batch may have none.
        what = F.cross_entropy(shapes[asked & ~thing], batch["shapes"][asked & ~thing], reduction="sum") / max(
            1, int((asked & ~thing).sum())
        )
        objects = max(1, int(thing.sum()))
        what = what + F.cross_entropy(shapes[thing], batch["shapes"][thing], reduction="sum") / objects
        what = what + 0.5 * F.cross_entropy(colors[thing], batch["colors"][thing], reduction="sum") / objects
        where, count, apart = self._words(read, batch, single)
        numbers = {
            "accuracy": float((right * weight).sum() / weight.sum()),
            "answer": float(answer.detach()),
            **self._hard(logits, truth, batch["task"]),
            "where": float(where.detach()),
            "count": float(count.detach()),
            "apart": float(apart.detach()),
            "shape_accuracy": float((shapes[thing].argmax(-1) == batch["shapes"][thing]).sum()) / objects,
        }
        return answer + 0.5 * (what + where + count + apart), numbers

    @staticmethod
    def _words(read: Read, batch: dict[str, Any], single: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean error of the centres of named objects, cross-entropy of their numbers, mean error of offsets; without
        pictures of two scenes."""

        def error(found: Tensor, wanted: Tensor) -> Tensor:
            known = ~wanted.isnan().any(dim=-1) & single.view(-1, *[1] * (wanted.ndim - 2))
            return (found[known] - wanted[known]).abs().sum() / max(1, int(known.sum()))

        asked = (batch["counts"] >= 0) & single[:, None, None]
        wrong = F.cross_entropy(read.counts[asked], batch["counts"][asked], reduction="sum") / max(1, int(asked.sum()))
        return error(read.centres, batch["centres"]), wrong, error(read.offsets, batch["offsets"])

    @staticmethod
    def _hard(logits: Tensor, truth: Tensor, task: Tensor) -> dict[str, float]:
        """How often the true caption beats the false ones, in tasks where the names alone do not decide."""
        numbers = {}
        for name in ("position", "color_attr"):
            chosen = (task == TASKS.index(name)) & (truth[:, 0] == 1)
            beaten = logits[chosen, :1] > logits[chosen, 1 : 1 + FALSE]
            numbers[f"order_{name}"] = float(beaten.float().mean()) if len(beaten) else 0.5
        return numbers

    def _spoil(self, pixels: Tensor, truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Degraded pictures, the truth of their captions, and which pictures show one scene [n]."""
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
        order = torch.randperm(n, generator=generator).to(pixels.device)  # so that any of them may be blurred
        pixels = torch.empty_like(pixels).index_copy(0, order, augment(pixels[order], generator))
        return pixels, truth, ~double

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Save the verifier to `folder` in half precision."""
        copy.deepcopy(module.verifier).to(torch.float16).save_pretrained(folder)  # type: ignore[operator,union-attr]
        write_record(folder, self.name, record)
