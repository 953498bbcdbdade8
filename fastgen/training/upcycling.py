"""Recipes `dc-graft` and `dc-finetune`: both stages of upcycling a trained pipeline (section 10).

Stage 1 trains the new encoder, router and decoder against the frozen original: its prediction, and what its first and
last layers say. Stage 2 trains everything but the embeddings of timestep and condition by the original's own diffusion
loss, with a tail drop drawn for every batch. The data are the original's own samples (`fastgen.training.samples`), so
neither stage needs a data set.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import FastgenError
from fastgen.io import read_object
from fastgen.models.chunking import ratio_loss
from fastgen.models.dc_dit import DCDiTTransformer2DModel, DCTransformerOutput
from fastgen.models.dc_z_image import DCZImageTransformer2DModel
from fastgen.models.upcycle import DCModel, backbone_names, upcycle
from fastgen.pretrained import load_pretrained
from fastgen.training.cards import write_record
from fastgen.training.dc_z_image import RATIO_WEIGHT, draw_tail_drop
from fastgen.training.families import Activations, Noisy, family_of
from fastgen.training.samples import Samples

_DROPOUT = 0.1
_STUDENTS = {kind.__name__: kind for kind in (DCDiTTransformer2DModel, DCZImageTransformer2DModel)}


class _Student(torch.nn.Module):
    """What the engine trains: the student alone, so that checkpoints hold no teacher."""

    adamw_names = ("scaffold", "adaptor", "embedder", "adaLN", "modulation")

    def __init__(self, recipe: UpcyclingRecipe, student: DCModel) -> None:
        super().__init__()
        self.student = student
        self._family = recipe.family

    def forward(
        self, noisy: Noisy, conditions: dict[str, Any], tail_drop: float
    ) -> tuple[Tensor, DCTransformerOutput]:
        """Prediction and everything the student tells."""
        return self._family.predict(self.student, noisy, conditions, tail_drop)


class UpcyclingRecipe(ABC):
    """What both stages share.

    Args:
        seed: seed of the new parts.
        pipe: the original `ZImagePipeline` or `DiTPipeline`.
        samples: its own samples.
        student: folder of an upcycled transformer to go on from; None upcycles the pipeline's.
        warm_up: batches of tail drop 0 at the start, in items.
        scaffold: configuration of the scaffold, where the student is new.
    """

    name = ""

    def __init__(
        self,
        seed: int,
        pipe: Any,
        samples: Samples,
        student: Path | None = None,
        warm_up: int = 20_000,
        **scaffold: Any,
    ) -> None:
        self.family, self.samples, self.warm_up = family_of(pipe), samples, warm_up
        self.family.teacher.eval().requires_grad_(False)
        torch.manual_seed(seed)
        self.student: DCModel = (
            upcycle(self.family.teacher, **scaffold) if student is None else load_student(student)
        ).float()

    def build(self) -> torch.nn.Module:
        """The student, with what this stage freezes frozen."""
        frozen = self.frozen_names()
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return _Student(self, self.student.train())

    @abstractmethod
    def frozen_names(self) -> set[str]:
        """The student's parameters that keep their values."""

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Samples of the original, which of their conditions to drop, and the batch's tail drop."""
        latents, labels = self.samples.batch(start, size)
        dropped = torch.rand(size, generator=generator) < _DROPOUT
        return {
            "latents": latents,
            "labels": labels,
            "dropped": dropped.tolist(),
            "tail_drop": draw_tail_drop(start, self.warm_up, generator),
        }

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """The stage's loss plus the ratio loss of the natural sets."""
        latents = batch["latents"]
        self.family.teacher.to(latents.device)
        noisy = self.family.corrupt(latents, generator)
        with torch.no_grad():
            conditions = self.family.conditions(batch["labels"], batch["dropped"])
        prediction, output = module(noisy, conditions, batch["tail_drop"])
        own, numbers = self.stage_loss(prediction, output, noisy, conditions)
        chunks = output.chunks
        ratio = ratio_loss(chunks.probabilities, chunks.natural, self.student.config.compression)
        numbers |= {"ratio": float(ratio.detach()), "kept": float(chunks.natural.float().mean())}
        return own + RATIO_WEIGHT * ratio, numbers

    @abstractmethod
    def stage_loss(
        self, prediction: Tensor, output: Any, noisy: Noisy, conditions: dict[str, Any]
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of this stage and numbers for the log."""

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Save the student in half precision to `folder/transformer`."""
        half: Any = copy.deepcopy(self.student).to(torch.float16)
        half.save_pretrained(folder / "transformer")
        write_record(folder, self.name, record)


class GraftRecipe(UpcyclingRecipe):
    """Stage 1: the scaffold learns to say what the original's ends say."""

    name = "dc-graft"

    def frozen_names(self) -> set[str]:
        return set(backbone_names(self.student))

    def stage_loss(
        self, prediction: Tensor, output: Any, noisy: Noisy, conditions: dict[str, Any]
    ) -> tuple[Tensor, dict[str, float]]:
        taught = self.family.teach(noisy, conditions)
        parts = graft_losses(prediction, output, taught)
        return torch.stack(list(parts.values())).sum(), {name: float(part.detach()) for name, part in parts.items()}


class FinetuneRecipe(UpcyclingRecipe):
    """Stage 2: diffusion loss with multiple budgets; embeddings of timestep and condition stay."""

    name = "dc-finetune"

    def frozen_names(self) -> set[str]:
        names = (name for name, _ in self.student.named_parameters())
        return {name for name in names if name.split(".")[0] in self.family.frozen}

    def stage_loss(
        self, prediction: Tensor, output: Any, noisy: Noisy, conditions: dict[str, Any]
    ) -> tuple[Tensor, dict[str, float]]:
        loss = self.family.loss(prediction, noisy).mean()
        return loss, {"diffusion": float(loss.detach())}


def graft_losses(prediction: Tensor, output: DCTransformerOutput, taught: Activations) -> dict[str, Tensor]:
    """Squared errors against the original, each divided by the variance of what is to be matched.

    A position's target is what the original says of its 2 x 2 patch. Encoder outputs count where they were kept: only
    those reach the backbone.

    Args:
        prediction: the student's, [n, C', h, w].
        output: with chunks, encoder outputs and decoder inputs.
        taught: the teacher's.

    Returns:
        "prediction", "embedded" and "final".
    """
    if output.chunks is None or output.encoded is None or output.decoded is None:
        raise ValueError("output: needs the chunks; call the model with output_chunks=True")
    grid = output.chunks.grid
    embedded, final = (_spread(tokens, grid) for tokens in (taught.embedded, taught.final))
    kept = output.chunks.mask
    return {
        "prediction": _relative(prediction, taught.prediction),
        "embedded": _relative(output.encoded[kept], embedded[kept]),
        "final": _relative(output.decoded, final),
    }


def _relative(value: Tensor, target: Tensor) -> Tensor:
    return (value.float() - target.float()).square().mean() / target.float().var().clamp(min=1e-6)


def _spread(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [n, H W / 4, D] of 2 x 2 patches to their positions, [n, H W, D]."""
    patches = tokens.unflatten(1, (grid[0] // 2, grid[1] // 2))
    return patches.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1, 2)


def load_student(folder: Path) -> DCModel:
    """An upcycled transformer from its folder.

    Raises:
        ValueError: the folder holds another model.
    """
    path = folder / "config.json"
    kind = read_object(path).get("_class_name") if path.is_file() else None
    if not isinstance(kind, str) or kind not in _STUDENTS:
        raise FastgenError(f"init: {folder} holds no transformer with dynamic chunking (found {str(kind)[:60]})")
    student: DCModel = load_pretrained(_STUDENTS[kind], folder)
    return student
