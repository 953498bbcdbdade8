"""`fastgen eval`: scores of models and folders, and the validation of the checker that gives them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.cli.eval_fid import fid
from fastgen.errors import FastgenError

if TYPE_CHECKING:
    from PIL import Image

    from fastgen.evaluation.distributed import Group
    from fastgen.evaluation.runner import EvaluationRun, Generate, OnProgress
    from fastgen.pipelines.checkpoint import Checkpoint

app = typer.Typer(help="Score images and models.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]


app.command("fid")(fid)


@app.callback()
def _group() -> None:
    """Score images and models."""


@app.command("shapes")
def shapes(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="tiny (default), tiny-janus, a local folder, a Hub id, or renders (the ceiling)."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Score this folder (GenEval layout) and generate nothing.")
    ] = None,
    images_per_prompt: Annotated[int, typer.Option("--images-per-prompt", help="Images a prompt.")] = 4,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Denoising steps; the model's default if not set.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", help="Guidance; the model's default if not set.")
    ] = None,
    tail_drop: Annotated[
        float | None, typer.Option("--tail-drop", help="Share of tokens to drop (dynamic chunking).")
    ] = None,
    uncond_tail_drop: Annotated[
        float | None, typer.Option("--uncond-tail-drop", help="The same for the unconditional branch (Lite-CFG).")
    ] = None,
    token_budget: Annotated[
        int | None, typer.Option("--token-budget", help="Exact number of image tokens (dynamic chunking).")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="speculative (decoding of image tokens); else what the model is.")
    ] = None,
    tree: Annotated[
        str | None, typer.Option("--tree", help="What a round drafts, e.g. jacobi-12 (speculative).")
    ] = None,
    acceptance: Annotated[
        str | None, typer.Option("--acceptance", help="What is accepted, e.g. exact (speculative).")
    ] = None,
    quality: Annotated[
        float | None, typer.Option("--quality", help="Of acceptance cascade, 0 to 1 (speculative).")
    ] = None,
    drafter: Annotated[
        str | None, typer.Option("--drafter", help="Folder, Hub id or none; default: the model's own (speculative).")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at once, at most.")] = 32,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant/--fast-batches",
            help="Pixels that do not depend on the batch, or faster batches with pixels equal up to rounding.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the run; every image gets its own from it.")] = 0,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Only the first N prompts of each task, for a quick look.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of images and results; a killed run continues there."),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="Also write a contact sheet of 64 prompts (PNG).")
    ] = None,
    captions: Annotated[bool, typer.Option("--captions", help="Prompts under the images of the sheet.")] = False,
    allow_small: Annotated[
        bool, typer.Option("--allow-small", help="FD-shapes even of fewer than 256 images (biased).")
    ] = False,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16.")] = "auto",
    as_json: Json = False,
) -> None:
    """ShapesWorld-GenEval and FD-shapes of a model, or of a folder of images."""
    _check_options(images_per_prompt, steps, guidance_scale, batch_size, seed, limit, sheet)
    budget = {"--tail-drop": tail_drop, "--uncond-tail-drop": uncond_tail_drop, "--token-budget": token_budget}
    _check_budget(budget)
    decoding = {"--method": method, "--tree": tree, "--acceptance": acceptance, "--quality": quality}
    decoding |= {"--drafter": drafter}
    _check_decoding(decoding)
    if images is not None:
        given = {"--model": model, "--steps": steps, "--guidance-scale": guidance_scale, "--limit": limit}
        _refuse_with_images({**given, **budget, **decoding})
    _check_device(device, dtype)
    model = model or "tiny"

    from fastgen.accounting import account, phase
    from fastgen.evaluation.distributed import Group
    from fastgen.evaluation.fid.reference import user_cache_dir
    from fastgen.evaluation.geneval.shapes import load_detector
    from fastgen.evaluation.runner import results_jsonl
    from fastgen.evaluation.shapesworld import score_folder
    from fastgen.io import atomic_write_bytes, atomic_write_json, check_writable, save_png

    for place in (sheet.parent if sheet is not None else None, out):
        if place is not None:
            check_writable(place)
    group = Group.from_environment(device)
    with group.reporting(), account() as stats, _progress(group.is_main) as on_progress:
        report: dict[str, Any] = {}
        folder, target = images, out
        where = group.device(device)
        if folder is None:
            settings = {
                "images_per_prompt": images_per_prompt,
                "seed": seed,
                "steps": steps,
                "guidance_scale": guidance_scale,
                "device": device,
                "dtype": dtype,
                "batch_size": None if batch_invariant else batch_size,
                "tail_drop": tail_drop,
                "uncond_tail_drop": uncond_tail_drop,
                "token_budget": token_budget,
                "method": method,
                "tree": tree,
                "acceptance": acceptance,
                "quality": quality,
                "drafter": drafter,
            }
            run = _open_run(model, settings, limit, out, group)
            folder = target = run.folder
            detector = load_detector(device=where)  # a missing checker must not cost a generation first
            with phase("generate"):
                made = run.generate(_generator(model, run, batch_size), on_progress)
            count, seconds = run.timing()
            report = {
                "model": model,
                "settings": {**_settings(run), "images_made_now": made},
                "seconds_per_image": seconds / count if count else None,
            }
        else:
            if not folder.is_dir():
                raise FastgenError(f"--images: {folder}: no such folder")
            detector = load_detector(device=where)
        score = score_folder(
            folder,
            detector,
            device=where,
            allow_small=allow_small,
            group=group,
            work=target / ".work" if target is not None else user_cache_dir(),
            on_progress=on_progress,
        )
        if not group.is_main:
            return
        report = {**score.data, **report, "images": str(folder)}
        if sheet is not None:
            save_png(sheet, score.sheet(captions=captions))
            report["sheet"] = str(sheet)
    report["stats"] = stats.as_dict()
    if target is not None:
        atomic_write_bytes(target / "results.jsonl", results_jsonl(folder, score.samples, score.results))
        atomic_write_json(target / "scores.json", report)
        report["results"] = str(target / "scores.json")
    score.discard()
    typer.echo(json.dumps(report) if as_json else _scores_text(report))


@app.command("checker")
def checker(
    n: Annotated[int, typer.Option("--n", help="Clean renders.")] = 2000,
    n_perturbed: Annotated[
        int | None, typer.Option("--n-perturbed", help="Renders at each perturbation level; default min(n, 500).")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="ShapesWorld seed; default is no training seed.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the result here as JSON, and its table beside it as .md.")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Accuracy and calibration of the ShapesWorld checker on renders with known truth."""
    if n < 1:
        raise FastgenError(f"--n: {n} is not allowed, needs >= 1")
    if n_perturbed is not None and not 1 <= n_perturbed <= n:
        raise FastgenError(f"--n-perturbed: {n_perturbed} is not allowed, needs 1 .. --n ({n})")
    if seed is not None and not 0 <= seed < 2**63:
        raise FastgenError(f"--seed: {seed} is not allowed, needs 0 .. 2**63 - 1")
    if out is not None and out.suffix != ".json":
        raise FastgenError(f"--out: {out} is not allowed, needs a name that ends in .json")
    _check_device(device)

    from fastgen.environment import environment
    from fastgen.evaluation.geneval.shapes import ShapesChecker, fingerprint, load_detector
    from fastgen.evaluation.geneval.validation import VALIDATION_SEED, validate_checker
    from fastgen.evaluation.results import checker_markdown
    from fastgen.io import atomic_write_bytes, atomic_write_json, check_writable

    if out is not None:
        check_writable(out.parent)
    detector = load_detector(device=device)
    with _progress() as on_progress:
        data = validate_checker(
            ShapesChecker(detector, device=device),
            n,
            seed=VALIDATION_SEED if seed is None else seed,
            n_perturbed=n_perturbed,
            on_progress=lambda done, total: on_progress("check", done, total),
        )
    data |= {"detector": fingerprint(detector), "environment": environment()}
    text = checker_markdown(data)
    if out is not None:
        atomic_write_json(out, data)
        atomic_write_bytes(out.with_suffix(".md"), text.encode())
    typer.echo(json.dumps(data) if as_json else text)


def _check_device(device: str, dtype: str = "auto") -> None:
    """FastgenError when this machine cannot compute on `device` in `dtype`."""
    from fastgen.pipelines.checkpoint import check_names
    from fastgen.pipelines.loading import resolve_device

    check_names(device, dtype)
    resolve_device(device, dtype)


def _refuse_with_images(options: dict[str, Any]) -> None:
    """FastgenError when an option of generation is given although nothing is generated."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise FastgenError(f"{', '.join(given)}: not allowed with --images, which generates nothing")


# --- pieces of `shapes` ------------------------------------------------------------------------------------------


def _check_options(
    images_per_prompt: int,
    steps: int | None,
    guidance_scale: float | None,
    batch_size: int,
    seed: int,
    limit: int | None,
    sheet: Path | None,
) -> None:
    for name, value in (
        ("--images-per-prompt", images_per_prompt),
        ("--steps", steps),
        ("--batch-size", batch_size),
        ("--limit", limit),
    ):
        if value is not None and value < 1:
            raise FastgenError(f"{name}: {value} is not allowed, needs >= 1")
    if guidance_scale is not None and not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise FastgenError(f"--guidance-scale: {guidance_scale} is not allowed, needs a number >= 0")
    if not 0 <= seed < 2**63:
        raise FastgenError(f"--seed: {seed} is not allowed, needs 0 .. 2**63 - 1")
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise FastgenError(f"--sheet: {sheet} is not allowed, needs a name that ends in .png")


def _check_decoding(options: dict[str, Any]) -> None:
    """Options of speculative decoding."""
    from fastgen.pipelines.arguments import check_value

    if options["--method"] not in (None, "speculative"):
        raise FastgenError(f"--method: {options['--method']!r} is not allowed, needs speculative")
    for label, value in options.items():
        if value is not None and label != "--method":
            if options["--method"] is None:
                raise FastgenError(f"{label}: needs --method speculative")
            if label != "--drafter":  # it is looked for with the model
                check_value(label, label.removeprefix("--"), value)


def _check_budget(budget: dict[str, Any]) -> None:
    """Refuse a budget that no model can take."""
    from fastgen.pipelines.arguments import check_value

    for option, value in budget.items():
        if value is not None:
            check_value(option, option.removeprefix("--").replace("-", "_"), value)


def _open_run(
    model: str, settings: dict[str, Any], limit: int | None, out: Path | None, group: Group
) -> EvaluationRun:
    """The run in `out`; without one, in a folder of the working directory that is named after its settings, so that
    the same command continues the same run and another one starts its own."""
    import hashlib
    from dataclasses import asdict

    from fastgen.evaluation.runner import EvaluationRun, RunSettings
    from fastgen.evaluation.shapesworld import RENDERS, shapes_prompts
    from fastgen.pipelines.checkpoint import find_checkpoint, find_drafter

    identity = RENDERS
    if model != RENDERS:
        checkpoint = find_checkpoint(model)
        own = settings["drafter"] is None
        drafter = None if own or settings["method"] is None else find_drafter(checkpoint, settings["drafter"])
        identity = _identity(checkpoint, drafter)
    run = RunSettings(model=model, model_fingerprint=identity, **settings)
    if out is None:
        key = hashlib.sha256(json.dumps([asdict(run), limit]).encode()).hexdigest()[:8]
        out = Path("fastgen-eval") / f"shapes-{Path(model).name}-{key}"
    return EvaluationRun(out, shapes_prompts(limit), run, group)


def _identity(checkpoint: Checkpoint, drafter: Path | None) -> str:
    """What tells two versions of a model apart: its files, or the commit of a Hub model (the name of its folder); and
    the files of a drafter that is not its own."""
    from fastgen.evaluation.runner import model_fingerprint

    others = () if drafter is None else (drafter,)
    if checkpoint.hub_id is not None:
        name = f"{checkpoint.hub_id}@{checkpoint.folder.name}"
        return f"{name} {model_fingerprint(*others)}" if others else name
    return model_fingerprint(*checkpoint.folders, *others)


def _generator(model: str, run: EvaluationRun, batch_size: int) -> Generate:
    """Draws with `model`; it is loaded when images are due, so a finished run loads nothing."""
    from fastgen.evaluation.shapesworld import RENDERS, render_prompts

    if model == RENDERS:
        return render_prompts

    def generate(prompts: list[str], seeds: list[int]) -> Iterator[Image.Image]:
        from fastgen.pipelines.loading import generate_images, load_pipeline

        settings = run.settings
        pipe = load_pipeline(
            model,
            device=run.group.device(settings.device),
            dtype=settings.dtype,
            method=settings.method,
            drafter=settings.drafter,
        )
        pictures = generate_images(
            pipe,
            prompts,
            seeds,
            steps=run.settings.steps,
            guidance_scale=run.settings.guidance_scale,
            tail_drop=run.settings.tail_drop,
            uncond_tail_drop=run.settings.uncond_tail_drop,
            token_budget=run.settings.token_budget,
            tree=run.settings.tree,
            acceptance=run.settings.acceptance,
            quality=run.settings.quality,
            batch_size=batch_size,
            batch_invariant=run.settings.batch_size is None,
        )
        return (picture.image for picture in pictures)

    return generate


def _settings(run: EvaluationRun) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(run.settings), "prompts": len(run.prompts)}


def _scores_text(report: dict[str, Any]) -> str:
    """The scores for people."""
    from fastgen.evaluation.report import provenance

    lines = [f"{report['benchmark']}: {report['n_images']} images of {report['n_prompts']} prompts"]

    def row(name: str, score: float, stderr: float | None) -> str:
        error = "" if stderr is None else f" ± {stderr:.3f}"
        return f"  {name:<16}{score:.3f}{error}"

    lines += [row(tag, task["score"], task["stderr"]) for tag, task in report["tasks"].items()]
    lines.append(row("mean of tasks", report["overall"], report["overall_stderr"]) + "  (standard error by prompt)")
    lines.append(f"  correct images {report['correct_images']:.3f}, correct prompts {report['correct_prompts']:.3f}")
    fd = report["fd_shapes"]
    if fd["value"] is None:
        lines.append(f"{fd['protocol']}: no value, {fd['reason'].removeprefix('FD-shapes: ')}")
    else:
        lines.append(f"{fd['protocol']}: {fd['value']:.3f} ({fd['n_images']} images)")
    if report.get("seconds_per_image") is not None:
        lines.append(f"{report['seconds_per_image']:.3f} s per image on {report['settings']['device']}")
    lines.append(provenance(report))
    for name in ("images", "sheet", "results"):
        if name in report:
            lines.append(f"{name}: {report[name]}")
    return "\n".join(lines)


@contextmanager
def _progress(shown: bool = True) -> Iterator[OnProgress]:
    """Progress bars with the time left, on stderr and only on a terminal; yields the callback."""
    if not shown or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield update
