"""Recipes `dc-graft` and `dc-finetune`: both stages of upcycling a trained pipeline (section 10).

Stage 1 trains the new encoder, router and decoder against the frozen original: its prediction, and the activations of
its first and last layers. Stage 2 trains everything except the timestep and condition embeddings with the original's
diffusion loss and a random tail drop per sample. The data are the original's own samples (`fastgen.training.samples`),
so neither stage needs a dataset, or pictures with captions (`fastgen.training.pictures`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.errors import FastgenError
from fastgen.io import read_object
from fastgen.models.chunking import Chunks, ratio_loss
from fastgen.models.dc_dit import DCDiTTransformer2DModel, DCTransformerOutput
from fastgen.models.dc_z_image import DCZImageTransformer2DModel
from fastgen.models.upcycle import DCModel, backbone_names, upcycle
from fastgen.pretrained import load_pretrained
from fastgen.training.cards import write_record
from fastgen.training.families import Activations, Noisy, family_of
from fastgen.training.pictures import TrainingData

GROUP = 16
"""Consecutive items whose kept share is measured together; the batch per process should be a multiple of it."""
BUDGETS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Tail drops of multi-budget training (section 7 of arXiv 2603.06351)."""
_RATIO_WEIGHT = 0.03
_DROPOUT = 0.1
_STUDENTS = {kind.__name__: kind for kind in (DCDiTTransformer2DModel, DCZImageTransformer2DModel)}


class _Student(torch.nn.Module):
    """The module to train: only the student, so that checkpoints do not contain the teacher."""

    adamw_names = ("scaffold", "adaptor", "embedder", "adaLN", "modulation")
    compiled_shapes = None  # the number of kept tokens differs from batch to batch

    def __init__(self, recipe: UpcyclingRecipe, student: DCModel) -> None:
        super().__init__()
        self.student = student
        self._family = recipe.family
        groups = ("context_refiner", "noise_refiner", "layers", "last_layers", "transformer_blocks")
        blocks = {group: len(getattr(student, group, ())) for group in groups}
        self.compiled_parts = [f"student.{group}.{i}" for group, n in blocks.items() for i in range(n)]

    def forward(
        self, noisy: Noisy, conditions: dict[str, Any], budget: dict[str, Any]
    ) -> tuple[Tensor, DCTransformerOutput]:
        """The prediction and the student's full output."""
        prediction, output = self._family.predict(self.student, noisy, conditions, **budget)
        # Without dropped patches `share` is unused, but other processes wait for the gradients of all parameters.
        share: Any = getattr(self.student.scaffold, "share", None)
        if share is not None:
            prediction = prediction + 0.0 * sum(parameter.sum() for parameter in share.parameters())
        return prediction, output


class UpcyclingRecipe(ABC):
    """Base class of all stages.

    An item's random numbers depend only on the seed and the item, so the division into batches, micro-batches and
    processes does not matter. Losses are means over items, or over groups of `GROUP` items.

    Args:
        seed: seed of the new parts, and of dropped conditions, noise and budgets.
        pipe: the original `ZImagePipeline` or `DiTPipeline`.
        samples: its own samples, or pictures with captions.
        student: folder of an upcycled transformer to continue from; None upcycles the pipeline's.
        warm_up: items with tail drop 0 at the start.
        scaffold: configuration of a new student's scaffold.
    """

    name = ""
    shardable = True
    taught = True
    """Whether the original's forward pass is needed."""

    def __init__(
        self,
        seed: int,
        pipe: Any,
        samples: TrainingData,
        student: Path | None = None,
        warm_up: int = 20_000,
        **scaffold: Any,
    ) -> None:
        self.seed, self.family, self.samples, self.warm_up = seed, family_of(pipe), samples, warm_up
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        torch.manual_seed(seed)
        self.student: DCModel = (
            upcycle(self.family.teacher, **scaffold) if student is None else load_student(student)
        ).float()

    def build(self) -> torch.nn.Module:
        """The student, with this stage's frozen parameters."""
        frozen = self.frozen_names()
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return _Student(self, self.student.train())

    @abstractmethod
    def frozen_names(self) -> set[str]:
        """The student's parameters that keep their values."""

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Samples of the original, flags of dropped conditions, and budgets."""
        values, labels = self.samples.batch(start, size)
        items = list(range(start, start + size))
        generators = [item_generator(self.seed, item) for item in items]
        dropped = torch.cat([torch.rand(1, generator=each) for each in generators]) < _DROPOUT
        budget = self.budget(items, dropped, generators)
        return {"values": values, "labels": labels, "dropped": dropped.tolist(), "items": items, **budget}

    def budget(self, items: list[int], dropped: Tensor, generators: list[torch.Generator]) -> dict[str, Any]:
        """Tail drops of the items; one number if all are equal."""
        drops = [draw_tail_drop(item, self.warm_up, own) for item, own in zip(items, generators, strict=True)]
        return {"tail_drop": drops[0] if len(set(drops)) == 1 else drops}

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """The stage's loss plus the loss of its router."""
        values = batch["values"]
        if self.taught:
            self.family.teacher.to(values.device)
        generators = [item_generator(self.seed, item, 1) for item in batch["items"]]
        with torch.no_grad():
            latents = values if values.is_floating_point() else self.family.encode(values, generators)
            parts = zip(latents.split(1), generators, strict=True)
            noisy = Noisy.joined([self.family.corrupt(part, own) for part, own in parts])
            conditions = self.family.conditions(batch["labels"], batch["dropped"], values.device)
        budget = {name: batch[name] for name in ("tail_drop", "token_budget") if name in batch}
        prediction, output = module(noisy, conditions, budget)
        own, numbers = self.stage_loss(prediction, output, noisy, conditions)
        router, measured = self.router_loss(output.chunks, noisy, batch)
        return own + router, numbers | measured

    def router_loss(self, chunks: Chunks, noisy: Noisy, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """The ratio loss of the natural sets."""
        ratio = ratio_loss(chunks.probabilities, chunks.natural, self.student.config.compression, GROUP)
        return _RATIO_WEIGHT * ratio, {"ratio": float(ratio.detach()), "kept": float(chunks.natural.float().mean())}

    @abstractmethod
    def stage_loss(
        self, prediction: Tensor, output: Any, noisy: Noisy, conditions: dict[str, Any]
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of this stage and numbers for the log."""

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Save the student in half precision to `folder/transformer`."""
        half_copy(self.student).save_pretrained(folder / "transformer")
        write_record(folder, self.name, record)


def draw_tail_drop(item: int, warm_up: int, generator: torch.Generator) -> float:
    """The tail drop of an item: one of `BUDGETS`, 0 in the first `warm_up` items."""
    drawn = BUDGETS[int(torch.randint(len(BUDGETS), (), generator=generator))]
    return 0.0 if item < warm_up else drawn


def item_generator(seed: int, item: int, purpose: int = 0) -> torch.Generator:
    """The generator of one item."""
    state = np.random.SeedSequence((seed, item, purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def half_copy(model: Any) -> Any:
    """A float16 copy of a model; it may have been sharded."""
    copied = type(model).from_config(model.config).to(torch.float16)
    copied.load_state_dict(model.state_dict())
    return copied


class GraftRecipe(UpcyclingRecipe):
    """Stage 1: the scaffold learns to reproduce the original's prediction and outer activations."""

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
    """Stage 2: diffusion loss with multiple budgets; timestep and condition embeddings are frozen."""

    name = "dc-finetune"
    taught = False

    def frozen_names(self) -> set[str]:
        names = (name for name, _ in self.student.named_parameters())
        return {name for name in names if name.split(".")[0] in self.family.frozen}

    def stage_loss(
        self, prediction: Tensor, output: Any, noisy: Noisy, conditions: dict[str, Any]
    ) -> tuple[Tensor, dict[str, float]]:
        loss = self.family.loss(prediction, noisy).mean()
        return loss, {"diffusion": float(loss.detach())}


def graft_losses(prediction: Tensor, output: DCTransformerOutput, taught: Activations) -> dict[str, Tensor]:
    """Squared errors against the original, each divided by the variance of the sample's target.

    A position's target is the original's activation at its 2 x 2 patch. Encoder outputs count only at kept positions:
    the others do not reach the backbone.

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
    every = torch.ones_like(output.chunks.mask)
    return {
        "prediction": _relative(prediction.flatten(2).mT, taught.prediction.flatten(2).mT, every),
        "embedded": _relative(output.encoded, embedded, output.chunks.mask),
        "final": _relative(output.decoded, final, every),
    }


def _relative(value: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Mean relative error over samples of [n, L, D], at the positions `counted`, bool [n, L]."""
    errors = (value.float() - target.float()).square().mean(dim=-1)
    own = torch.where(counted, errors, 0.0).sum(dim=1) / counted.sum(dim=1)
    return (own / target.float().flatten(1).var(dim=1).clamp(min=1e-6)).mean()


def _spread(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Repeat tokens [n, H W / 4, D] of 2 x 2 patches at their positions, [n, H W, D]."""
    patches = tokens.unflatten(1, (grid[0] // 2, grid[1] // 2))
    return patches.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1, 2)


def load_student(folder: Path) -> DCModel:
    """Load an upcycled transformer.

    Raises:
        FastgenError: the folder has another model.
    """
    student: DCModel = load_pretrained(_STUDENTS[student_config(folder)["_class_name"]], folder)
    return student


def student_config(folder: Path) -> dict[str, Any]:
    """The configuration of an upcycled transformer.

    Raises:
        FastgenError: the folder has another model.
    """
    path = folder / "config.json"
    config = read_object(path) if path.is_file() else {}
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in _STUDENTS:
        raise FastgenError(f"init: {folder} has no transformer with dynamic chunking (found {str(kind)[:60]})")
    return config
