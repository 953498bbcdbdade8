"""`fastgen tune`: which parts of `accelerate` pay for a model on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.cli.methods import best_device, check_device, find_model
from fastgen.cli.options import load_options, with_loading
from fastgen.cli.publish import DtypeOption, JsonOption, has_matplotlib
from fastgen.errors import FastgenError

if TYPE_CHECKING:
    from fastgen.evaluation.tuning import Trial
    from fastgen.pipelines.accelerate import Plan
    from fastgen.pipelines.loading.checkpoint import Checkpoint
    from fastgen.pipelines.loading.load_options import LoadOptions

app = typer.Typer(help="Measure what makes a model faster here, and write a plan.")

_SHEET = 6  # pictures of a row


@app.command()
@with_loading
def tune(
    context: typer.Context,
    prompts_file: Annotated[Path, typer.Option(help="UTF-8, one prompt per line; the first --prompts are drawn.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan; plot and contact sheet go next to it.")],
    model: Annotated[str, typer.Option(help="An embedded model, a folder, or a Hub id.")] = "tiny",
    minutes: Annotated[float, typer.Option(help="Time limit in minutes; no new measurement starts after it.")] = 10.0,
    loss: Annotated[
        str, typer.Option(help="exact: only parts that change no picture beyond rounding; lossy: all parts.")
    ] = "lossy",
    metric: Annotated[
        str,
        typer.Option(
            help="What a plan may lose: ssim or lpips (likeness to the stock pictures), shapes (ShapesWorld-GenEval), "
            "or a verifier: shapes-verifier, clip-score, pick-score …"
        ),
    ] = "ssim",
    max_drop: Annotated[
        float, typer.Option(help="Largest drop of the mean score, by the upper end of its 95 % interval.")
    ] = 0.05,
    prompts: Annotated[int, typer.Option(help="Pictures of each measurement.")] = 12,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps. Default: the model's.", show_default=False)
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Try regional compilation too.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    **_: Any,
) -> None:
    """Measure what makes a model faster here, and write a plan.

    Every plan is timed against the stock pipeline picture by picture, with the same seeds. Fewer steps alone are
    always among the plans. An interrupted run resumes from its log.

    fastgen tune --model tiny --prompts-file prompts.txt --minutes 5 -o plan.json

    fastgen generate "a red circle" --plan plan.json
    """
    from fastgen.checks import check_choice, check_integer, check_number
    from fastgen.cli.plan import read_prompts_file
    from fastgen.io import check_writable
    from fastgen.locks import locked_files
    from fastgen.pipelines.schema import SCHEMA, check_prompt

    check_choice("--loss", loss, ("exact", "lossy"))
    check_number("--minutes", minutes, above=0)
    check_number("--max-drop", max_drop, 0)
    check_integer("--prompts", prompts, 3)
    if output.suffix != ".json":
        raise FastgenError(f"--output: {output} is not allowed, plans are written as .json")
    if steps is not None:
        SCHEMA["steps"].check("--steps", steps)
    texts = [check_prompt(text) for text in read_prompts_file(prompts_file)]
    texts = [texts[i % len(texts)] for i in range(prompts)]
    check_device(best_device() if device == "auto" else device, dtype)
    given = SimpleNamespace(**context.params)
    options = load_options(given)
    checkpoint = find_model(model, given.variant, given.revision)
    check_writable(output.parent)
    files = [output, output.with_suffix(".log.jsonl"), output.with_suffix(".png"), output.with_suffix(".sheet.png")]
    context.with_resource(locked_files(files))

    with contextlib.redirect_stdout(sys.stderr):
        plan, plots = _measure(given, texts, options, checkpoint, files)
    written = {"plan": str(output), **({"plot": str(files[2])} if plots else {}), "sheet": str(files[3])}
    typer.echo(json.dumps({**plan.as_dict(), "files": written}) if as_json else str(plan))
    typer.echo(", ".join(written.values()), err=True)


def _measure(
    given: Any, texts: list[str], options: LoadOptions, checkpoint: Checkpoint, files: list[Path]
) -> tuple[Plan, bool]:
    """Measure, and write the plan, the plot and the contact sheet.

    Args:
        given: options of the command.
        files: of the plan, the log, the plot and the contact sheet.

    Returns:
        the plan, and whether there is a plot.
    """
    from fastgen.cli.plan import model_digest
    from fastgen.evaluation import tune_report
    from fastgen.evaluation.tune_metrics import load_metric
    from fastgen.evaluation.tuning import Tuner, candidates, front
    from fastgen.io import atomic_write_bytes
    from fastgen.pipelines.loading import load_checkpoint, resolve_device
    from fastgen.pipelines.schema import SETTINGS
    from fastgen.pipelines.settings import draws_tokens, pipeline_class, resolve_settings

    kind_of_pipe = pipeline_class(checkpoint)
    if draws_tokens(kind_of_pipe):
        raise FastgenError(f"--model: {given.model!r} draws tokens; see --method speculative, --tree auto")
    drawn = resolve_settings(kind_of_pipe, checkpoint, {**dict.fromkeys(SETTINGS), "steps": given.steps})
    where, weights = resolve_device(best_device() if given.device == "auto" else given.device, given.dtype)
    options.check(kind_of_pipe, checkpoint.index, where)
    kind = str(weights).removeprefix("torch.")
    scorer = load_metric(given.metric, texts, str(where))
    call = {"steps": given.steps, "batch_size": 1}
    if not (plots := has_matplotlib()):
        typer.echo("note: there will be no plot, it needs matplotlib (python -m pip install matplotlib)", err=True)
    pipe: Any = load_checkpoint(checkpoint, device=str(where), dtype=kind, options=options)
    header = _header(given.model, model_digest(checkpoint), where, kind, texts, given.metric, call)
    header |= {"loading": options.recorded} if options.recorded else {}
    tuner = Tuner(pipe, texts, scorer, call, files[1], header, time.monotonic() + 60 * given.minutes, _report)
    parts = candidates(pipe, "lossy" if given.loss == "lossy" else "exact", given.compile)
    chosen = tuner.tune(parts, given.max_drop)
    _remember_compiling(pipe, tuner.trials, {**drawn, "batch_size": 1})
    plan = _plan(pipe, tuner.trials, chosen, header, given.metric, given.max_drop)
    shown = dict.fromkeys([(), chosen.parts, *(trial.parts for trial in front(tuner.trials))])
    names = {trial.parts: trial.name for trial in tuner.trials}
    rows = [(names[parts], tuner.draw(parts, _SHEET)) for parts in shown]
    plan.save(files[0])
    atomic_write_bytes(files[3], tune_report.contact_sheet(rows))
    if plots:
        tune_report.plot(tuner.trials, chosen, given.metric, files[2])
    return plan, plots


def _header(
    model: str, digest: str, device: Any, dtype: str, prompts: list[str], metric: str, call: dict[str, Any]
) -> dict[str, Any]:
    """What the measurements depend on."""
    from fastgen.environment import environment

    here = environment()
    return {
        "model": model,
        "weights": digest,
        "device": device.type,
        "processor": here["gpus"][device.index or 0] if device.type == "cuda" else here["cpu"],
        "threads": here["threads"],
        "dtype": dtype,
        "versions": here["versions"],
        "commit": here["commit"],
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "images": len(prompts),
        "metric": metric,
        "settings": call,
    }


def _remember_compiling(pipe: Any, trials: list[Trial], call: dict[str, Any]) -> None:
    """Write down what compilation cost and gave, so that `generate` knows for how many pictures it pays."""
    from statistics import median

    from fastgen.pipelines.accelerate.compile_costs import CompileCosts, remember_costs
    from fastgen.pipelines.accelerate.parts import Compile

    for trial in trials:
        if trial.parts == (Compile(),):
            costs = CompileCosts(trial.first_seconds, median(trial.seconds), median(trial.stock_seconds))
            remember_costs(pipe, call, costs)


def _report(trial: Trial) -> None:
    typer.echo(_line(trial), err=True)


def _line(trial: Trial) -> str:
    if not trial.parts:
        return f"stock: score {trial.score:.4f}"
    ratio, (drop, half) = trial.ratio, trial.drop
    return (
        f"{trial.name}: {ratio[0]:.3f} of the stock seconds ({ratio[1]:.3f} to {ratio[2]:.3f}), "
        f"score {trial.score:.4f}, drop {drop:.4f} ± {half:.4f}"
    )


def _plan(pipe: Any, trials: list[Trial], chosen: Trial, header: dict[str, Any], metric: str, max_drop: float) -> Plan:
    """The chosen plan with all that was measured."""
    from fastgen.environment import environment
    from fastgen.evaluation.tuning import beats_fewer_steps, front
    from fastgen.pipelines.accelerate import Plan, Row
    from fastgen.pipelines.accelerate.plan import denoiser_digest

    rows = [Row(part, True, _line(chosen)) for part in chosen.parts]
    alone = {trial.parts[-1]: trial for trial in trials if trial.parts and trial.parts[-1] not in chosen.parts}
    rows += [Row(part, False, _line(trial)) for part, trial in alone.items()]
    ratio, (drop, half) = chosen.ratio, chosen.drop
    on_front = {trial.name for trial in front(trials)}
    table = [
        {
            "plan": trial.name,
            "ratio": trial.ratio,
            "seconds": sum(trial.seconds) / len(trial.seconds),
            "score": trial.score,
            "drop": trial.drop,
            "largest_difference": trial.largest_difference,
            "first_seconds": trial.first_seconds,
            "peak_bytes": trial.peak_bytes,
            "loss": trial.loss,
            "front": trial.name in on_front,
            "beats_fewer_steps": beats_fewer_steps(trial, trials),
        }
        for trial in trials
    ]
    measured = {
        "ratio": ratio,
        "score": chosen.score,
        "drop": (drop, half),
        "metric": metric,
        "max_drop": max_drop,
        **header,
        "denoiser": denoiser_digest(pipe),
        "environment": environment(),
        "trials": table,
    }
    return Plan(type(pipe).__name__, tuple(rows), json.loads(json.dumps(measured)))
