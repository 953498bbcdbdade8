"""Run under torchrun or `accelerate launch`: upcycling recipes train with their weights divided between processes.

Arguments: output folder, the folder of a Z-Image, a folder of pictures with captions, and as JSON `TrainConfig`
fields, the recipes, and the step at which the last process kills itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastgen.training.engine import Trainer
from fastgen.training.recipe_settings import UpcyclingSettings
from fastgen.training.recipes import RECIPES
from fastgen.training.sharding import end_process

SIZE = 32


def settings_of(name: str, output: Path, model: Path, pictures: Path) -> UpcyclingSettings:
    """Of a recipe that learns from pictures of `SIZE`; stage 2 continues from stage 1."""
    places: dict[str, Any] = {"part": model, "data": pictures, "size": SIZE, "shard": True}
    if name == "dc-finetune":
        places["init"] = output / "dc-graft" / "model" / "transformer"
    return RECIPES[name](**places)  # type: ignore[return-value]


def train(name: str, output: Path, model: Path, pictures: Path, kill_at: int | None = None, **fields: Any) -> None:
    """Three steps of a recipe, or fewer where the last process is killed."""
    settings = settings_of(name, output, model, pictures)
    chosen = {"lr": 1e-3, "warmup": 0, "decay": 0.0, "ema_decay": 0.5, "accumulate": 1, "checkpoint_every": 1}
    config = replace(settings.train_config(output / name), **{**chosen, "steps": 3, "precision": "fp32", **fields})
    trainer = Trainer(settings.build(), config)
    draw, last = trainer.recipe.batch, trainer.accelerator.is_last_process

    def batch(start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        if trainer.step == kill_at and last:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(start, size, generator)

    trainer.recipe.batch = batch  # type: ignore[method-assign]
    trainer.run()
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = json.loads(sys.argv[4])
    for recipe in options.pop("recipes"):
        train(recipe, *map(Path, sys.argv[1:4]), **options)
    end_process()
