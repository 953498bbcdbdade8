"""`fastgen train`: the recipes of the embedded checkpoints."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgen.errors import FastgenError

CALIBRATE = "cascade-calibrate"
SEARCH = "search-calibrate"

# Options of the recipes that train, and of all.
_TRAINING = {"steps", "batch_size", "accumulate", "compile", "precision", "lr", "workers", "max_minutes", "threads"}
_ALWAYS = {"output", "seed", "as_json"}

app = typer.Typer(help="Train an embedded model by its recipe; resumable.")


def summaries() -> dict[str, str]:
    """What each recipe trains."""
    from fastgen.training.recipes import RECIPES

    calibrations = {
        CALIBRATE: "thresholds of CASCADE-R for a model (--part) with its drafter (--init)",
        SEARCH: "thresholds of noise search for a model (--part) with a verifier (--init)",
    }
    return {name: entry.summary for name, entry in RECIPES.items()} | calibrations


def options_of(recipe: str) -> set[str]:
    """The options that a recipe takes, by the names of their parameters."""
    from fastgen.training.recipes import CHOOSING, RECIPES

    if recipe == CALIBRATE:
        return _ALWAYS | {"part", "init", "data", "samples", "prompts_file"}
    if recipe == SEARCH:
        return _ALWAYS | {"part", "init", "samples", "prompts_file", "batch_size", "choose", "threads"}
    entry, found = RECIPES[recipe], _ALWAYS | _TRAINING
    if entry.needs or entry.upcycles:
        found |= {"part"}
    if entry.continues:
        found |= {"init"}
    if entry.draws or recipe == "heads":
        found |= {"data", "samples", "prompts_file"}
    return found | ({"choose"} if recipe in CHOOSING else set())


def helps_of(recipe: str) -> dict[str, str]:
    """What options mean for this recipe, by the names of their parameters, where it differs from the general help."""
    from fastgen.training.recipes import RECIPES

    if recipe == CALIBRATE:
        return {
            "part": "Model that draws tokens, by name, folder or Hub id.",
            "init": "Folder of its drafter.",
            "data": "Result of `fastgen bench speculative`: its score drops and costs choose the default source.",
            "samples": "Pictures to measure, at least 0. Default: 50.",
            "prompts_file": "Prompts, one a line, or 'shapesworld'.",
        }
    if recipe == SEARCH:
        return {
            "part": "Diffusion pipeline by name, folder or Hub id.",
            "init": "Verifier by name or folder.",
            "samples": "Trajectories to measure, at least 0. Default: 1000.",
            "prompts_file": "Prompts, one a line; their scores replace the check of pictures. Default: ShapesWorld.",
            "batch_size": "Trajectories at a time, at least 1. Default: 32.",
            "choose": "KEY=VALUE: steps, guidance_scale, height, width, sampler, branches; image and mask (files) or "
            "strength, for a pipeline that begins with a picture; repeat.",
        }
    entry = RECIPES[recipe]
    parts = {
        "vae": "Folder of a trained VAE (FOLDER/model/vae of `fastgen train vae -o FOLDER`).",
        "vq": "Folder of a trained VQ tokenizer (FOLDER/model/vq of `fastgen train vq -o FOLDER`).",
        "z-image": "Z-Image pipeline: an embedded name or a folder.",
        "janus": "Janus by name, folder or Hub id.",
        "": "Z-Image or DiT pipeline by name, folder or Hub id.",
    }
    labels = {"steps": "Total optimizer steps, at least 1", "lr": "Peak learning rate, above 0"}
    labels |= {
        "batch_size": "Batch size per process, at least 1",
        "accumulate": "Gradient-accumulation steps, a divisor of the batch size",
    }
    defaults = {"accumulate": 1, **entry.settings}
    return {
        "part": parts[entry.needs],
        "init": "Folder FOLDER/model/transformer of dc-graft, required."
        if recipe == "dc-finetune"
        else "Model folder to continue from.",
        "data": "Folder of recorded windows." if recipe == "heads" else "Folder of the pipeline's own samples.",
        "samples": "First draw this many samples into --data; 0 = use what is there.",
        "choose": {
            "heads": "KEY=VALUE of the new heads' configuration; repeat.",
            "dc-patch": "KEY=VALUE: anneal (items over which the share of kept patches falls), "
            "cost, or the new scaffold's configuration (compression=8, floor=0.0625, n_last_layers=2); repeat.",
        }.get(
            recipe,
            "KEY=VALUE: a loss term, kind, or the new drafter's configuration (redundancy=class, width=128); repeat.",
        ),
        **{name: f"{text}. Default: {defaults[name]}." for name, text in labels.items()},
    }


@app.command()
def train(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(help="One of the recipes below."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Output folder for the checkpoint, the log and the model.")
    ],
    part: Annotated[
        Path | None,
        typer.Option(
            help="What the recipe builds on: a VAE (z-image) or VQ (janus) folder, a pipeline (small, dc, dc-dense, "
            "dc-patch), a Janus (drafter), any Z-Image or DiT pipeline by name, folder or Hub id (dc-graft, "
            "dc-finetune), or the model that a calibration is for."
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            help="Model folder to continue from; the drafter (cascade-calibrate) or the verifier, by name or folder "
            "(search-calibrate)."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the pipeline's own samples (dc-graft, dc-finetune).")
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            help="First draw this many samples into --data; 0 = use what is there. Calibrations: pictures to measure."
        ),
    ] = 0,
    prompts_file: Annotated[
        str | None,
        typer.Option(help="Prompts of the samples, one a line, or 'shapesworld'; a DiT draws every class in turn."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Total optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Batch size per process.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Gradient-accumulation steps.")] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help="Use torch.compile.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, bf16 or fp32; auto is bf16 where it is native.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    workers: Annotated[int | None, typer.Option(help="Data-loading processes; 0 = none.")] = None,
    choose: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE of the drafter recipe (redundancy=class, width=128, kind=medusa …) or of search-calibrate "
            "(steps, guidance_scale, height, width, sampler, branches, image, mask, strength); repeat.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, data and noise.")] = 0,
    max_minutes: Annotated[
        float, typer.Option(help="Save a checkpoint and stop after this many minutes; 0 = never.")
    ] = 0.0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 = torch's default.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON object.")] = False,
) -> None:
    """Train one of the embedded models by its recipe; `fastgen train RECIPE --help` shows its options.

    Run the same command again to resume from the checkpoint. Ctrl-C stops after the current step and saves one.
    """
    if recipe not in summaries():
        raise FastgenError(f"unknown recipe {recipe!r}; choose one of {', '.join(summaries())}")
    _refuse_others(recipe, context)
    if recipe == CALIBRATE:
        _calibrate(part, init, output, data, samples, prompts_file, seed, as_json)
        return
    if recipe == SEARCH:
        _calibrate_search(part, init, output, samples, prompts_file, batch_size, choose or [], seed, threads, as_json)
        return
    from fastgen.io import check_writable
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
        workers=workers,
        seed=seed,
        max_seconds=60.0 * max_minutes,
    )
    choices = _choices(choose or [])
    check_writable(output, create=False)
    if samples and recipe == "heads":
        _record(part, data, init, samples, prompts_file, seed)
    elif samples:
        _draw(recipe, part, data, samples, prompts_file, seed)
    built = build_recipe(recipe, seed, part, init, data, choices)

    import torch

    from fastgen.training.engine import Trainer

    if threads > 0:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # for the run alone: it holds for the whole process
    try:
        learnt = _learnt_from(part, init, data, choices)
        record = _with_progress(lambda report: Trainer(built, config, report, learnt), config.steps)
    finally:
        torch.set_flush_denormal(False)
    typer.echo(json.dumps(record) if as_json else f"{output / 'model'}: {json.dumps(record['last'])}")


def _learnt_from(part: Path | None, init: Path | None, data: Path | None, choices: dict[str, Any]) -> dict[str, Any]:
    """What the weights of a run come from: digests of the folders, names of what is on the Hub, and choices."""
    from fastgen.cli.plan import weights_digest
    from fastgen.pipelines.loading.checkpoint import EMBEDDED_MODELS, embedded_folder

    found: dict[str, Any] = {"choices": choices}
    for name, folder in (("part", part), ("init", init), ("data", data)):
        if folder is not None:
            place = embedded_folder(str(folder)) if str(folder) in EMBEDDED_MODELS else folder
            found[name] = weights_digest([place]) if place.is_dir() else str(folder)
    return found


def _choices(texts: list[str]) -> dict[str, Any]:
    """KEY=VALUE, the value read as JSON where it is some, else as a word."""
    from fastgen.io import parse_json

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or key in found:
            raise FastgenError(f"--set: {text!r} is not allowed, needs KEY=VALUE, each key once")
        try:
            found[key] = parse_json(value, "--set")
        except ValueError:
            found[key] = value
    return found


def _calibrate(
    part: Path | None,
    drafter: Path | None,
    output: Path,
    data: Path | None,
    pictures: int,
    prompts_file: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Thresholds of CASCADE-R; with `data`, a result of `bench speculative`, the scores and costs that it measured."""
    from fastgen.io import read_object

    if part is None or drafter is None:
        raise FastgenError(
            f"{CALIBRATE}: needs --part, a model that draws tokens, and --init, the folder of its drafter"
        )
    if pictures < 0:
        raise FastgenError(f"--samples: {pictures} is not allowed, needs an integer >= 0")
    prompts = None if prompts_file is None else _prompts(prompts_file, pictures or 50)
    if data is not None:
        from fastgen.drafters.calibration import Calibration

        made = Calibration.load(drafter).with_results(read_object(data))
        made.save(output)
    else:
        from fastgen.training.cascade_calibration import calibrate_cascade

        def say(done: int, total: int) -> None:
            typer.echo(f"pictures: {done} of {total}", err=True)

        made = calibrate_cascade(
            str(part), drafter, output, pictures=pictures or 50, prompts=prompts, seed=seed, report=say
        )
    levels = [asdict(level) for level in made.levels]
    typer.echo(json.dumps({"levels": levels}) if as_json else f"{output / 'calibration.json'}: {json.dumps(levels)}")


def _refuse_others(recipe: str, context: typer.Context) -> None:
    """Refuse options that were given to a recipe that knows nothing of them."""

    labels = {parameter.name: max(parameter.opts, key=len) for parameter in context.command.params}
    for name in context.params.keys() - options_of(recipe) - {"recipe"}:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise FastgenError(f"{labels[name]}: recipe {recipe} takes none")


def _calibrate_search(
    part: Path | None,
    verifier: Path | None,
    output: Path,
    samples: int,
    prompts_file: str | None,
    batch_size: int | None,
    choose: list[str],
    seed: int,
    threads: int,
    as_json: bool,
) -> None:
    """Thresholds of noise search."""
    from fastgen.evaluation.verifiers.names import verifier_class

    if part is None or verifier is None:
        raise FastgenError(f"{SEARCH}: needs --part, a diffusion pipeline, and --init, a verifier by name or folder")
    kind, _ = verifier_class(str(verifier))
    if prompts_file is None and kind.name != "shapes-verifier":
        raise FastgenError(f"--prompts-file: {SEARCH} with verifier {kind.name} needs one, or 'shapesworld'")
    if samples < 0:
        raise FastgenError(f"--samples: {samples} is not allowed, needs an integer >= 0")
    if batch_size is not None and batch_size < 1:
        raise FastgenError(f"--batch-size: {batch_size} is not allowed, needs an integer >= 1")
    settings = _choices(choose)
    prompts = None if prompts_file in (None, "shapesworld") else _prompts(str(prompts_file), 0)

    import torch

    from fastgen.training.search_calibrate import calibrate_search

    if threads > 0:
        torch.set_num_threads(threads)

    def say(done: int, total: int) -> None:
        typer.echo(f"trajectories: {done} of {total}", err=True)

    made = calibrate_search(
        str(part),
        str(verifier),
        output,
        trajectories=samples or 1000,
        prompts=prompts,
        seed=seed,
        batch_size=batch_size or 32,
        settings=settings,
        device="cuda" if torch.cuda.is_available() else "cpu",
        report=say,
    )
    found = {"fixed": made.fixed, "schedules": [asdict(schedule) for schedule in made.schedules]}
    typer.echo(json.dumps(found) if as_json else f"{output / 'thresholds.json'}: {json.dumps(found)}")


def _draw(recipe: str, part: Path | None, data: Path | None, count: int, prompts_file: str | None, seed: int) -> None:
    """Fill `data` with samples of the pipeline `part`."""
    if part is None or data is None:
        raise FastgenError(f"--samples: recipe {recipe} needs --part and --data")
    if count < 0:
        raise FastgenError(f"--samples: {count} is not allowed, needs an integer >= 0")
    prompts = None if prompts_file is None else _prompts(prompts_file, count)

    import torch
    from accelerate import PartialState

    from fastgen.io import check_writable
    from fastgen.locks import locked_folder
    from fastgen.pipelines.loading import load_checkpoint
    from fastgen.pipelines.loading.checkpoint import find_checkpoint
    from fastgen.training.samples import draw_samples

    checkpoint = find_checkpoint(str(part))
    settings = {"num_inference_steps" if key == "steps" else key: value for key, value in checkpoint.defaults.items()}
    if checkpoint.kind == "janus":  # it draws one size, and takes no other word for it
        settings = {key: value for key, value in settings.items() if key not in ("height", "width")}
    draws_classes = checkpoint.pipeline_class == "DiTPipeline"
    if prompts is not None and draws_classes:
        raise FastgenError("--prompts-file: a DiT draws classes and takes no prompts")
    if prompts is None and not draws_classes:
        raise FastgenError("--prompts-file: a pipeline that draws captions needs one, or 'shapesworld'")
    pipe = load_checkpoint(checkpoint, dtype="float32")
    labels = list(range(pipe.transformer.config.num_embeds_ada_norm)) if prompts is None else prompts
    pipe.set_progress_bar_config(disable=True)
    state = PartialState(cpu=not torch.cuda.is_available())
    check_writable(data)
    lock = locked_folder(data) if state.is_main_process else contextlib.nullcontext()
    with state.main_process_first(), lock:  # the others find them drawn
        draw_samples(pipe, data, labels, count, seed=seed, report=_say_samples, **settings)


def _record(
    part: Path | None, data: Path | None, init: Path | None, count: int, prompts: str | None, seed: int
) -> None:
    """Fill `data` with windows of the model `part`, corrected by the heads `init` if there are some."""

    if part is None or data is None or count < 0:
        raise FastgenError("--samples: recipe heads needs --part, --data and an integer >= 0")
    from fastgen.training.heads import record
    from fastgen.training.recipes import janus_folder

    texts = _prompts(prompts or "shapesworld", count)
    record(janus_folder("heads", part), data, texts, count, init=init, seed=seed, report=_say_samples)


def _prompts(name: str, count: int) -> list[str]:
    if name == "shapesworld":
        from fastgen.data.shapes import ShapesWorld

        return list(ShapesWorld(707).batch(min(count, 4096)).texts)
    from fastgen.cli.plan import read_prompts_file

    return read_prompts_file(Path(name))


def _say_samples(done: int, total: int) -> None:
    typer.echo(f"samples: {done} of {total}", err=True)


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
