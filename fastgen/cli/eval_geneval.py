"""`fastgen eval geneval`: GenEval of a model, of a folder of images, or of a file of verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.cli import eval_run as options
from fastgen.cli.eval_run import Drawing, drawing_options
from fastgen.cli.methods import BatchSizeOption
from fastgen.cli.notes import progress
from fastgen.cli.publish import DeviceOption, JsonOption
from fastgen.errors import FastgenError

if TYPE_CHECKING:
    from fastgen.evaluation.geneval.metadata import Metadata
    from fastgen.evaluation.geneval.scoring import Judge


@drawing_options
def geneval(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", help="Generate first: an embedded model, a local folder or a Hub id.")
    ] = None,
    images: options.Images = None,
    results: Annotated[
        Path | None, typer.Option("--results", help="Summarise this file of verdicts (results.jsonl), ours or not.")
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(
            "--detector",
            help="Mask2Former of COCO instances: Hub id, folder, or a folder of the converter. Default: "
            "facebook/mask2former-swin-small-coco-instance. shapes: the embedded one, for ShapesWorld prompts.",
        ),
    ] = None,
    color_model: Annotated[
        str | None,
        typer.Option("--color-model", help="Weights of open_clip's ViT-L-14 (tag or file), or an open_clip folder."),
    ] = None,
    metadata: Annotated[
        Path | None, typer.Option("--metadata", help="Prompts in GenEval's schema; the 553 official ones if not set.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Score a folder in which prompts or images are missing.")
    ] = False,
    self_test: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="First test the detector on photographs.")
    ] = True,
    self_test_photos: Annotated[
        Path | None,
        typer.Option("--self-test-photos", help="Folder of photographs named after what they show, e.g. cat.jpg."),
    ] = None,
    batch_size: BatchSizeOption = 4,
    seed: options.Seed = 0,
    limit: options.Limit = None,
    out: options.Out = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    **_: Any,
) -> None:
    """GenEval of a model, or of a folder of images in the official layout.

    Scores carry the name of their detector: "GenEval (HF-M2F)" with the weights on the Hub, which are not those of the
    official scorer.
    """
    chosen = [name for name, value in (("--model", model), ("--images", images), ("--results", results)) if value]
    if len(chosen) != 1:
        raise FastgenError(f"needs one of --model, --images and --results, got {' and '.join(chosen) or 'none'}")
    drawing = Drawing.of(context, images or results)
    if results is not None:
        _summarise(results, out, as_json)
        return

    import transformers

    from fastgen.accounting import account
    from fastgen.evaluation.distributed import Group
    from fastgen.evaluation.geneval.named_judges import load_judge
    from fastgen.evaluation.geneval.scoring import score_images
    from fastgen.evaluation.report import source_lines
    from fastgen.evaluation.shapesworld import DETECTOR, RENDERS, render_prompts
    from fastgen.io import check_writable, user_cache_dir
    from fastgen.locks import locked_folder

    transformers.utils.logging.disable_progress_bar()
    for option, path in (("--images", images), ("--metadata", metadata), ("--self-test-photos", self_test_photos)):
        if path is not None and not (path.exists() if path is metadata else path.is_dir()):
            raise FastgenError(f"{option}: {path}: no such {'file' if path is metadata else 'folder'}")
    if out is not None:
        check_writable(out, create=False)
    group = Group.from_environment(device)
    with group.reporting(), account() as stats, progress(group.is_main) as on_progress:
        judge = load_judge(detector, color_model, device=group.device(device), photos=self_test_photos, test=self_test)
        folder, target, report = images, out, dict[str, Any]()
        expected = _prompts(metadata, judge, limit) if metadata is not None or images is None else None
        if folder is None:
            drawers = {RENDERS: render_prompts} if judge.name == DETECTOR else {}
            run = drawing.open("geneval", expected or (), out, group, drawers)
            context.with_resource(run.run.locked())
            folder = target = run.run.folder
            report = run.make(on_progress)
        elif out is not None and group.is_main:
            check_writable(out)
            context.with_resource(locked_folder(out))
        score = score_images(
            folder,
            judge,
            expected=expected,
            partial=partial,
            group=group,
            work=target / ".work" if target is not None else user_cache_dir(),
            on_progress=on_progress,
        )
        if not group.is_main:
            return
    report = score.finish(folder, target, {**report, "stats": stats.as_dict()})
    typer.echo(json.dumps(report) if as_json else "\n".join([*_lines(report), *source_lines(report)]))


def _prompts(path: Path | None, judge: Judge, limit: int | None) -> list[Metadata]:
    """What is drawn or must be there; unknown classes and colours are found before anything is drawn."""
    from fastgen.evaluation.geneval.metadata import first_of_each_task, read_metadata
    from fastgen.evaluation.geneval.prompts import official_prompts
    from fastgen.evaluation.shapesworld import DETECTOR, shapes_prompts

    if path is not None:
        colors = getattr(judge.colors or judge.detector, "color_names", None)
        prompts = read_metadata(path, class_names=judge.detector.class_names, color_names=colors)
    else:
        prompts = shapes_prompts() if judge.name == DETECTOR else list(official_prompts())
    return first_of_each_task(prompts, limit)


def _summarise(path: Path, out: Path | None, as_json: bool) -> None:
    """The summary of a file of verdicts."""
    from fastgen.evaluation.geneval.verdict_files import summarize_file
    from fastgen.io import atomic_write_json, check_writable

    if out is not None:
        check_writable(out)
    report = summarize_file(path)
    if out is not None:
        atomic_write_json(out / "scores.json", report)
    typer.echo(json.dumps(report) if as_json else "\n".join([*_lines(report), f"verdicts: {path}"]))


def _lines(report: dict[str, Any]) -> list[str]:
    """The scores for people, and everything that keeps them from being compared with others."""
    from fastgen.evaluation.report import task_lines

    first, *tasks = task_lines(report)
    notes = [f"{first}, detector={report['detector_name']}", *tasks]
    if report.get("partial"):
        notes.append(f"partial: {report['partial']}")
    if report.get("differs"):
        notes.append(f"not the official protocol: {report['differs']}")
    if "self_test" in report and report["self_test"] is None:
        notes.append("the detector was not tested (--no-self-test)")
    return notes
