"""`fastgen train`: one command per recipe of the embedded checkpoints."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.checks import check_integer
from fastgen.cli.options import option_name, with_options
from fastgen.errors import FastgenError
from fastgen.training.recipe_settings import DrawnSettings, RecipeSettings, TrainingSettings
from fastgen.training.recipes import RECIPES, CascadeCalibrate, Heads, SearchCalibrate, janus_folder

if TYPE_CHECKING:
    from fastgen.training.train_config import TrainConfig

app = typer.Typer(
    help="Train an embedded model by its recipe, or calibrate one; `fastgen train RECIPE --help` shows its options.",
    no_args_is_help=True,
)


def _add(kind: type[RecipeSettings], act: Callable[[Any, Path, bool], None], help: str) -> None:
    """Add a command for a recipe, with the options of its settings."""

    def command(
        output: Annotated[Path, typer.Option("--output", "-o", help="Output folder.")],
        as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
        **values: Any,
    ) -> None:
        settings = kind.of(values, option_name)
        settings.check_together()
        act(settings, output, as_json)

    example = f"fastgen train {kind.name} {kind.example} -o runs/{kind.name}".replace("  ", " ")
    added = app.command(kind.name, help=help, short_help=kind.summary, epilog=f"Examples:\n\n{example}")
    added(with_options(kind)(command))


def _train(settings: TrainingSettings, output: Path, as_json: bool) -> None:
    from fastgen.io import check_writable

    config = settings.train_config(output)
    check_writable(output, create=False)
    _check_checkpoint(settings, config)
    if isinstance(settings, DrawnSettings) and settings.samples:
        (_record if isinstance(settings, Heads) else _draw)(settings, settings.samples)
    built = settings.build()

    import torch

    from fastgen.training.engine import Trainer
    from fastgen.training.sharding import end_process

    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.set_flush_denormal(True)  # only during the run: it is global to the process
    try:
        data = _data_of(settings)
        if identity := getattr(getattr(built, "samples", None), "identity", ""):
            data["pictures"] = identity
        record = _with_progress(lambda report: Trainer(built, config, report, data), config.steps)
    finally:
        torch.set_flush_denormal(False)
    typer.echo(json.dumps(record) if as_json else f"{output / 'model'}: {json.dumps(record['last'])}")
    end_process()


def _check_checkpoint(settings: TrainingSettings, config: TrainConfig) -> None:
    """Refuse a checkpoint of another run before anything is loaded; most of the time goes to importing torch."""
    path = config.output_dir / "checkpoint.pt"
    if path.exists():
        import torch
        from accelerate import PartialState

        from fastgen.training.checkpoints import check_resumable
        from fastgen.training.engine import run_settings

        processes = PartialState(cpu=not torch.cuda.is_available()).num_processes
        check_resumable(path, settings.name, config.seed, run_settings(config, processes))


def _data_of(settings: TrainingSettings) -> dict[str, Any]:
    """Identifies a run's inputs: digests of folders, Hub ids, and choices."""
    from fastgen.cli.plan import weights_digest
    from fastgen.pipelines.loading.checkpoint import EMBEDDED_MODELS, embedded_folder

    found: dict[str, Any] = {"choices": settings.choices}
    for name in ("part", "init", "data"):
        if (folder := settings.path(name)) is not None:
            place = embedded_folder(str(folder)) if str(folder) in EMBEDDED_MODELS else folder
            found[name] = weights_digest([place]) if place.is_dir() else str(folder)
    return found


def _calibrate(settings: CascadeCalibrate, output: Path, as_json: bool) -> None:
    """Thresholds of CASCADE-R; with `data`, a result of `bench speculative`, its scores and costs."""
    from fastgen.io import read_object

    drafter, pictures = settings.needed("init"), settings.samples or 50
    prompts = None if settings.prompts_file is None else _prompts(settings.prompts_file, pictures)
    if (measured := settings.path("data")) is not None:
        from fastgen.drafters.calibration import Calibration

        made = Calibration.load(drafter).with_results(read_object(measured))
        made.save(output)
    else:
        from fastgen.training.cascade_calibration import calibrate_cascade

        seed, report = settings.seed or 0, _progress_of("pictures")
        made = calibrate_cascade(
            str(settings.part), drafter, output, pictures=pictures, prompts=prompts, seed=seed, report=report
        )
    levels = [asdict(level) for level in made.levels]
    typer.echo(json.dumps({"levels": levels}) if as_json else f"{output / 'calibration.json'}: {json.dumps(levels)}")


def _calibrate_search(settings: SearchCalibrate, output: Path, as_json: bool) -> None:
    """Thresholds of noise search."""
    from fastgen.evaluation.verifiers.names import verifier_class

    given, verifier = settings.prompts_file, str(settings.init)
    kind, _ = verifier_class(verifier)
    if given is None and kind.name != "shapes-verifier":
        raise FastgenError(f"--prompts-file: {settings.name} with verifier {kind.name} needs one, or 'shapesworld'")
    prompts = None if given in (None, "shapesworld") else _prompts(str(given), 0)

    import torch

    from fastgen.training.search_calibrate import calibrate_search

    if settings.threads:
        torch.set_num_threads(settings.threads)
    made = calibrate_search(
        str(settings.part),
        verifier,
        output,
        trajectories=settings.samples or 1000,
        prompts=prompts,
        seed=settings.seed or 0,
        batch_size=settings.batch_size or 32,
        settings=settings.choices,
        device="cuda" if torch.cuda.is_available() else "cpu",
        report=_progress_of("trajectories"),
    )
    found = {"fixed": made.fixed, "schedules": [asdict(schedule) for schedule in made.schedules]}
    typer.echo(json.dumps(found) if as_json else f"{output / 'thresholds.json'}: {json.dumps(found)}")


def _draw(settings: DrawnSettings, count: int) -> None:
    """Fill the folder `data` with samples of the pipeline `part`."""
    data = Path(settings.data or "")
    prompts = None if settings.prompts_file is None else _prompts(settings.prompts_file, count)

    import torch
    from accelerate import PartialState

    from fastgen.io import check_writable
    from fastgen.locks import locked_folder
    from fastgen.pipelines.loading import load_checkpoint
    from fastgen.pipelines.loading.checkpoint import find_checkpoint
    from fastgen.training.samples import draw_samples

    checkpoint = find_checkpoint(str(settings.part))
    call = {"num_inference_steps" if key == "steps" else key: value for key, value in checkpoint.defaults.items()}
    if checkpoint.kind == "janus":  # draws one size only; its pipeline has no such arguments
        call = {key: value for key, value in call.items() if key not in ("height", "width")}
    draws_classes = checkpoint.pipeline_class == "DiTPipeline"
    if prompts is not None and draws_classes:
        raise FastgenError("--prompts-file: a DiT draws classes and takes no prompts")
    if prompts is None and not draws_classes:
        raise FastgenError("--prompts-file: a pipeline with captions needs one, or 'shapesworld'")
    pipe = load_checkpoint(checkpoint, dtype="float32")
    labels = list(range(pipe.transformer.config.num_embeds_ada_norm)) if prompts is None else prompts
    pipe.set_progress_bar_config(disable=True)
    state = PartialState(cpu=not torch.cuda.is_available())
    check_writable(data)
    lock = locked_folder(data) if state.is_main_process else contextlib.nullcontext()
    with state.main_process_first(), lock:  # the others reuse the samples
        draw_samples(pipe, data, labels, count, seed=settings.seed or 0, report=_progress_of("samples"), **call)


def _record(settings: DrawnSettings, count: int) -> None:
    """Fill the folder `data` with windows of the model `part`, corrected by the heads `init`, if any."""
    from fastgen.training.heads import record

    folder, data = janus_folder(settings.name, settings.needed("part")), settings.needed("data")
    init = settings.path("init")
    texts = _prompts(settings.prompts_file or "shapesworld", count)
    choices, seed = settings.choices, settings.seed or 0
    window = check_integer("window", choices["window"], 1) if "window" in choices else None
    record(folder, data, texts, count, init=init, window=window, seed=seed, report=_progress_of("samples"))


def _prompts(name: str, count: int) -> list[str]:
    if name == "shapesworld":
        from fastgen.data.shapes import ShapesWorld

        return list(ShapesWorld(707).batch(min(count, 4096)).texts)
    from fastgen.cli.plan import read_prompts_file

    return read_prompts_file(Path(name))


def _progress_of(what: str) -> Callable[[int, int], None]:
    return lambda done, total: typer.echo(f"{what}: {done} of {total}", err=True)


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

        return build(report).run()


for _kind in RECIPES.values():
    _add(
        _kind,
        _train,
        f"{_kind.name}: {_kind.summary}.\n\nRun the same command again to resume from the checkpoint. Ctrl-C stops "
        "after the current step and saves one.",
    )
_add(CascadeCalibrate, _calibrate, f"{CascadeCalibrate.name}: {CascadeCalibrate.summary}.")
_add(SearchCalibrate, _calibrate_search, f"{SearchCalibrate.name}: {SearchCalibrate.summary}.")
