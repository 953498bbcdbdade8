"""`fastgen eval shapes`: ShapesWorld-GenEval and FD-shapes of a model or a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgen.cli import eval_run as options
from fastgen.cli.eval_run import Drawing, drawing_options
from fastgen.cli.methods import BatchSizeOption
from fastgen.cli.notes import progress
from fastgen.cli.publish import DeviceOption, JsonOption
from fastgen.errors import FastgenError


@drawing_options
def shapes(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="tiny (default), tiny-janus, a local folder, a Hub id, or renders (the ceiling)."
        ),
    ] = None,
    images: options.Images = None,
    batch_size: BatchSizeOption = 32,
    seed: options.Seed = 0,
    limit: options.Limit = None,
    out: options.Out = None,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="Also write a contact sheet of 64 prompts (PNG).")
    ] = None,
    captions: Annotated[bool, typer.Option("--captions", help="Prompts under the images of the sheet.")] = False,
    allow_small: Annotated[
        bool, typer.Option("--allow-small", help="Allow FD-shapes of fewer than 256 images (biased).")
    ] = False,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    **_: Any,
) -> None:
    """ShapesWorld-GenEval and FD-shapes of a model, or of a folder of images."""
    drawing = Drawing.of(context, images)
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise FastgenError(f"--sheet: {sheet} is not allowed, needs a name that ends in .png")

    from fastgen.accounting import account
    from fastgen.evaluation.distributed import Group
    from fastgen.evaluation.geneval.shapes_checker import load_detector
    from fastgen.evaluation.shapesworld import RENDERS, render_prompts, score_folder, shapes_prompts
    from fastgen.io import check_writable, save_png, user_cache_dir
    from fastgen.locks import locked_folder

    for place in (sheet.parent if sheet is not None else None, out):
        if place is not None:
            check_writable(place)
    group = Group.from_environment(device)
    with group.reporting(), account() as stats, progress(group.is_main) as on_progress:
        report: dict[str, Any] = {}
        folder, target = images, out
        where = group.device(device)
        if folder is None:
            run = drawing.open("shapes", shapes_prompts(limit), out, group, {RENDERS: render_prompts})
            context.with_resource(run.run.locked())
            folder = target = run.run.folder
            detector = load_detector(device=where)  # a missing checker must not cost a generation first
            report = run.make(on_progress)
        else:
            if not folder.is_dir():
                raise FastgenError(f"--images: {folder}: no such folder")
            detector = load_detector(device=where)
            if out is not None and group.is_main:
                context.with_resource(locked_folder(out))
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
        if sheet is not None:
            save_png(sheet, score.sheet(captions=captions))
            report["sheet"] = str(sheet)
    report = score.finish(folder, target, {**report, "stats": stats.as_dict()})
    typer.echo(json.dumps(report) if as_json else _scores_text(report))


def _scores_text(report: dict[str, Any]) -> str:
    """The scores for people."""
    from fastgen.evaluation.report import source_lines, task_lines

    lines = task_lines(report)
    fd = report["fd_shapes"]
    if fd["value"] is None:
        lines.append(f"{fd['protocol']}: no value, {fd['reason'].removeprefix('FD-shapes: ')}")
    else:
        lines.append(f"{fd['protocol']}: {fd['value']:.3f} ({fd['n_images']} images)")
    return "\n".join([*lines, *source_lines(report)])
