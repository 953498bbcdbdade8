"""Run under torchrun: every recipe trains two steps in this process group and must end with one set of weights.

Arguments: a scratch folder, and the folder of a trained part for each recipe that needs one (vae, vq).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from short_recipes import build_recipe, train_config

from fastgen.pipelines.loading import load_pipeline
from fastgen.pipelines.loading.checkpoint import embedded_folder
from fastgen.training.engine import Recipe, Trainer
from fastgen.training.heads import record
from fastgen.training.recipes import RECIPES
from fastgen.training.samples import draw_samples


def record_starts(recipe: Recipe) -> list[int]:
    """The first item of every batch that `recipe` makes from now on."""
    starts: list[int] = []
    batch = recipe.batch

    def recorded(start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        starts.append(start)
        return batch(start, size, generator)

    recipe.batch = recorded  # type: ignore[method-assign]
    return starts


def draw(folder: Path) -> None:
    """Samples for the upcycling recipes, drawn once."""
    pipe = load_pipeline("tiny")
    with PartialState(cpu=True).main_process_first():
        draw_samples(pipe, folder, ["a red circle", "two blue squares"], 6, num_inference_steps=1, height=64, width=64)


def record_windows(folder: Path) -> None:
    """Windows for the recipe of heads, recorded once."""
    with PartialState(cpu=True).main_process_first():
        record(embedded_folder("tiny-janus"), folder, ["a red circle", "two blue squares"], 2)


def main() -> None:
    torch.set_num_threads(1)
    scratch = Path(sys.argv[1])
    parts = {"z-image": Path(sys.argv[2]), "janus": Path(sys.argv[3])}  # of the others: a whole pipeline
    parts |= dict.fromkeys(("drafter", "heads"), embedded_folder("tiny-janus"))
    draw(scratch / "samples")
    record_windows(scratch / "windows")
    for name, entry in RECIPES.items():
        config = train_config(name, scratch / name, steps=2, batch_size=4, accumulate=2, warmup=0, decay=0.0)
        part = parts.get(name, embedded_folder("tiny")) if "part" in entry.needs else None
        init = scratch / "dc-graft" / "model" / "transformer" if "init" in entry.needs else None
        data = scratch / ("windows" if name == "heads" else "samples") if "data" in entry.needs else None
        trainer = Trainer(build_recipe(name, 0, part, init, data), config)
        starts = record_starts(trainer.recipe)
        before = [param.detach().clone() for param in trainer.trained]
        trainer.run()
        accelerator = trainer.accelerator
        assert accelerator.num_processes == 2, "start me with torchrun --nproc-per-node 2"
        module = accelerator.unwrap_model(trainer.module)
        for key, value in module.state_dict().items():
            both = accelerator.gather(value.detach().float().contiguous()[None])
            assert torch.equal(both[0], both[1]), f"{name}: {key} differs between processes"
        unchanged = [torch.equal(a, b) for a, b in zip(before, trainer.trained, strict=True)]
        assert not all(unchanged), f"{name} learned nothing"
        seen = accelerator.gather(torch.tensor(starts)[None]).flatten().tolist()
        assert sorted(seen) == list(range(0, 16, 2)), f"{name}: items {seen}"
        accelerator.wait_for_everyone()  # the next recipe may read what this one wrote
        if accelerator.is_main_process:
            print(f"{name}: one model", flush=True)


if __name__ == "__main__":
    main()
