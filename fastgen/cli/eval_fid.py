"""`fastgen eval fid`: FID and its relatives of a folder, an archive or a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.cli import eval_run as options
from fastgen.cli.eval_run import Drawing, drawing_options
from fastgen.cli.notes import progress
from fastgen.cli.publish import DeviceOption, JsonOption
from fastgen.errors import FastgenError

if TYPE_CHECKING:
    from fastgen.cli.eval_run import GenerationRun
    from fastgen.evaluation.distributed import Group
    from fastgen.evaluation.fid.evaluate import FidSettings
    from fastgen.evaluation.fid.readers import ImageSource
    from fastgen.evaluation.fid.reference import Reference

# Name on the command line -> extractors whose metrics are computed by default.
_EXTRACTORS = {
    "shapes": ("shapes",),
    "inception": ("inception",),
    "dinov2": ("dinov2",),
    "clip": ("cmmd", "clip-score"),
}


@drawing_options
def fid(
    context: typer.Context,
    images: Annotated[
        Path | None,
        typer.Argument(metavar="IMAGES", help="Folder, .zip, .tar (webdataset) or .npz (ADM) of images."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            help="Images to compare with, or an .npz of statistics; for shapes fresh renders if not set.",
        ),
    ] = None,
    extractor: Annotated[
        str, typer.Option("--extractor", help="shapes (embedded), inception, dinov2 or clip.")
    ] = "shapes",
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            help="Instead of --extractor, with commas: fid, kid, is, sfid, precision, recall, cmmd, clip-score; or "
            "fd-, kd-, precision- and recall-, each with dinov2 or shapes.",
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option("--protocol", help="Protocol of Inception: adm, torch-fidelity, clean-fid or legacy-pytorch."),
    ] = "clean-fid",
    reference_protocol: Annotated[
        str | None, typer.Option("--reference-protocol", help="Protocol of a statistics file that does not name it.")
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", help="EXTRACTOR=FILE, folder or Hub id, e.g. inception=weights.pth; repeatable."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="Text file: a prompt an image in order (clip-score), or what --model draws (also GenEval .jsonl).",
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="Number of images; all if not set.")] = None,
    reference_n: Annotated[
        int | None, typer.Option("--reference-n", help="Number of reference images; all if not set.")
    ] = None,
    allow_small: Annotated[
        bool, typer.Option("--allow-small", help="Allow fewer images than twice the features (biased).")
    ] = False,
    mixed_sizes: Annotated[bool, typer.Option("--mixed-sizes", help="Allow images of different sizes.")] = False,
    bootstrap: Annotated[
        int,
        typer.Option("--bootstrap", help="Bootstrap replicates for the interval of a Fréchet distance; 0 for none."),
    ] = 100,
    seed: Annotated[int, typer.Option("--seed", help="Seed of bootstrap and random subsets.")] = 0,
    subsets: Annotated[int, typer.Option("--subsets", help="Random subsets of kernel distances.")] = 100,
    subset_size: Annotated[int, typer.Option("--subset-size", help="Images per subset.")] = 1000,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Batch size of the network.")] = 64,
    workers: Annotated[int | None, typer.Option("--workers", help="Threads that decode and resize.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Draw the images first: tiny, a folder, a Hub id, or renders (ShapesWorld)."),
    ] = None,
    draw_batch: Annotated[int, typer.Option("--draw-batch", help="Largest batch that is drawn.")] = 32,
    limit: options.Limit = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Folder of the drawn images; a killed run continues there.")
    ] = None,
    device: DeviceOption = "cpu",
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Folder of reference statistics and of unfinished work.")
    ] = None,
    save_statistics: Annotated[
        Path | None, typer.Option("--save-statistics", help="Write the statistics of IMAGES, a reference for later.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the result here as JSON.")] = None,
    as_json: JsonOption = False,
    **_: Any,
) -> None:
    """FID, KID, IS, sFID, precision, recall, CMMD, FD-DINOv2, CLIPScore or FD-shapes, each with its protocol."""
    if (images is None) == (model is None):
        raise FastgenError("needs IMAGES to score, or --model to draw them, and not both")
    drawing = Drawing.of(context, images, "draw_batch")
    from fastgen.evaluation.fid.evaluate import FidSettings, check_evaluation, evaluate_images, load_extractors
    from fastgen.io import user_cache_dir

    named_alike = [field.name for field in dataclasses.fields(FidSettings) if field.name != "metrics"]
    settings = FidSettings(
        _metrics(extractor, metrics, protocol, prompts is not None),
        **{name: context.params[name] for name in named_alike},
    )
    named = _weights(weights or [])
    for path, suffix in ((out, ".json"), (save_statistics, ".npz")):
        if path is not None and path.suffix != suffix:
            raise FastgenError(f"{path}: is not allowed, needs a name that ends in {suffix}")
    from fastgen.accounting import account
    from fastgen.evaluation.distributed import Group
    from fastgen.io import atomic_write_json, check_writable
    from fastgen.locks import locked_files

    group = Group.from_environment(device)
    with group.reporting():
        for path in (out, save_statistics):
            if path is not None and group.is_main:
                check_writable(path.parent)
                context.with_resource(locked_files([path]))
        against = _reference(reference, reference_protocol, settings)
        where = user_cache_dir() if cache is None else cache
        _check_cache(where)
        made: dict[str, Any] = {}
        with account() as stats, progress(group.is_main) as on_progress:
            if images is not None:
                source = _images(images, prompts)
                networks = load_extractors(settings, named, group)
            else:
                drawn = _open(drawing, prompts, settings, run, group)
                context.with_resource(drawn.run.locked())
                networks = load_extractors(settings, named, group)
                # What cannot be scored must not cost a generation first.
                check_evaluation(_planned(drawn), settings, against, networks)
                report = drawn.make(on_progress)
                made = {"generation": report.pop("settings"), **report}
                source = _images(drawn.run.folder, None)
            data, stores = evaluate_images(
                source,
                settings,
                reference=against,
                extractors=networks,
                group=group,
                cache=where,
                work=where,
                save_statistics=save_statistics,
                on_progress=on_progress,
            )
        if not group.is_main:
            return
        data |= {**made, "stats": stats.as_dict()}
        if out is not None:
            atomic_write_json(out, data)
        for store in stores:
            store.discard()
        typer.echo(json.dumps(data) if as_json else _text(data, out))


def _check_cache(folder: Path) -> None:
    try:
        folder.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise FastgenError(f"--cache: {folder}: {error.strerror}") from error


def _metrics(extractor: str, metrics: str | None, protocol: str, has_prompts: bool) -> tuple[str, ...]:
    from fastgen.evaluation.fid.protocols import METRICS, find_protocol, supported

    if metrics is not None:
        return tuple(name.strip() for name in metrics.split(",") if name.strip())
    if extractor not in _EXTRACTORS:
        raise FastgenError(f"--extractor: {extractor!r} is not allowed, needs one of {', '.join(_EXTRACTORS)}")
    chosen = find_protocol(protocol)
    names = [m.name for m in METRICS.values() if m.extractor in _EXTRACTORS[extractor] and supported(m, chosen)]
    return tuple(name for name in names if name != "clip-score" or has_prompts)


def _weights(options: list[str]) -> dict[str, str]:
    from fastgen.evaluation.fid.protocols import EXTRACTORS

    found = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not value or name not in EXTRACTORS:
            raise FastgenError(
                f"--weights: {option!r} is not allowed, needs NAME=PATH with a name of {', '.join(EXTRACTORS)}"
            )
        found[name] = value
    return found


def _open(
    drawing: Drawing, prompts: Path | None, settings: FidSettings, out: Path | None, group: Group
) -> GenerationRun:
    """The run that draws the images."""
    from fastgen.evaluation.geneval.metadata import Metadata, first_of_each_task, read_metadata
    from fastgen.evaluation.shapesworld import RENDERS, render_prompts, shapes_prompts

    if prompts is None:
        if any(extractor != "shapes" for extractor in settings.by_extractor()):
            raise FastgenError("--model: needs --prompts, a text file of what to draw")
        items = shapes_prompts()
    elif prompts.suffix == ".jsonl":
        items = read_metadata(prompts)
    else:
        items = [Metadata(tag="prompts", include=(), prompt=line) for line in _lines(prompts)]
    return drawing.open("fid", first_of_each_task(items, drawing.given.limit), out, group, {RENDERS: render_prompts})


def _planned(drawn: GenerationRun) -> ImageSource:
    """The images of a run before they are there."""
    from fastgen.evaluation.fid.readers import CallbackSource

    def make(index: int) -> Any:
        raise RuntimeError("the images are not drawn yet")

    run = drawn.run
    texts = [item.prompt for item in run.prompts for _ in range(run.settings.images_per_prompt)]
    return CallbackSource(len(texts), make, identity="planned", name=str(run.folder), prompts=texts)


def _lines(prompts: Path) -> list[str]:
    try:
        lines = prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FastgenError(f"--prompts: {prompts} cannot be read: {error}") from error
    if not lines or not all(line.strip() for line in lines):
        raise FastgenError(f"--prompts: {prompts}: needs one prompt a line and no blank line")
    return lines


def _images(path: Path, prompts: Path | None) -> ImageSource:
    from fastgen.evaluation.fid.readers import open_images

    source = open_images(path)
    if prompts is not None:
        lines = _lines(prompts)
        if len(lines) != len(source):
            raise FastgenError(f"--prompts: {prompts} has {len(lines)} lines, {path} has {len(source)} images")
        source.prompts = lines
    return source


def _reference(path: Path | None, protocol: str | None, settings: FidSettings) -> Reference | None:
    from fastgen.evaluation.fid.protocols import METRICS, find_protocol
    from fastgen.evaluation.fid.reference import open_reference

    if protocol is not None:
        find_protocol(protocol)
        if path is None:
            raise FastgenError("--reference-protocol: needs --reference")
    if path is not None:
        return open_reference(path, protocol)
    if all(METRICS[name].extractor == "shapes" for name in settings.metrics):
        from fastgen.evaluation.fid.fd_shapes import render_reference

        return render_reference()
    return None


def _text(data: dict[str, Any], out: Path | None) -> str:
    """The result for people."""
    from fastgen.evaluation.report import provenance

    lines = []
    for found in data["metrics"].values():
        error = ""
        if found.get("ci95"):
            error = " (95 %: {:.4g} to {:.4g})".format(*found["ci95"])
        elif found.get("std") is not None:
            error = f" ± {found['std']:.4g}"
        lines.append(f"{found['label']}: {found['value']:.4g}{error}")
    size = "x".join(map(str, data["resolution"])) if data.get("resolution") else "mixed"
    against = f" against {data['reference']['name']}" if data["reference"] else ""
    lines.append(f"{data['n_images']} images of {size} pixels in {data['images']}{against}")
    lines.append(provenance(data))
    if out is not None:
        lines.append(f"results: {out}")
    return "\n".join(lines)
