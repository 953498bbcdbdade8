"""`fastgen train`: the recipes of the embedded checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Train an embedded model by its recipe; resumable.")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="vae, vq, detector, z-image or janus.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of checkpoint, log and model.")],
    part: Annotated[
        Path | None, typer.Option(help="Trained part that the recipe builds on: a VAE (z-image) or VQ (janus) folder.")
    ] = None,
    init: Annotated[Path | None, typer.Option(help="Model folder to go on from (z-image, janus).")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps in all.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Items a step and process.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Parts a step's batch is worked off in.")] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help="torch.compile what the recipe names.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, bf16 or fp32; auto is bf16 where it is native.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, data and noise.")] = 0,
    max_minutes: Annotated[float, typer.Option(help="Stop with a checkpoint after so long; 0 = never.")] = 0.0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 = torch's default.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON object.")] = False,
) -> None:
    """Train one of the embedded models by its recipe.

    vae and vq and detector stand alone; z-image needs the trained vae and janus the trained vq as --part. Run the
    same command again to go on from the checkpoint; Ctrl-C stops after the step with a checkpoint.
    """
    from fastgen.training.recipes import build_recipe, train_config

    config = train_config(
        recipe,
        output,
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        compile=compile,
        precision=precision,
        lr=lr,
        seed=seed,
        max_seconds=60.0 * max_minutes,
    )
    built = build_recipe(recipe, seed, part, init)

    import torch

    from fastgen.training.engine import Trainer

    if threads > 0:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    record = _with_progress(lambda report: Trainer(built, config, report), config.steps)
    typer.echo(json.dumps(record) if as_json else f"{output / 'model'}: {json.dumps(record['last'])}")


def _with_progress(build: Any, total: int) -> dict[str, Any]:
    """Run the trainer under a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=total)

        def report(log: dict[str, Any]) -> None:
            numbers = "  ".join(
                f"{key} {value:.4g}" for key, value in log.items() if key not in ("step", "seconds", "lr")
            )
            progress.update(task, completed=log["step"], description=numbers)

        record: dict[str, Any] = build(report).run()
        return record
