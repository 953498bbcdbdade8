"""`fastgen generate`: pictures from a prompt or from a file of prompts, each with a JSON sidecar."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.cli import search as searching
from fastgen.cli.drawing import Drawing, prepare
from fastgen.cli.methods import (
    BatchInvariantOption,
    BatchSizeOption,
    DrafterOption,
    MethodOption,
    PlanOption,
    check_method_name,
)
from fastgen.cli.notes import progress
from fastgen.cli.options import option_name, with_loading, with_options
from fastgen.cli.publish import DtypeOption, JsonOption
from fastgen.errors import FastgenError
from fastgen.pipelines.schema import DRAWING, SearchSettings, check_prompt

if TYPE_CHECKING:
    from fastgen.cli.plan import Job
    from fastgen.pipelines.accelerate import Plan
    from fastgen.pipelines.generation import GeneratedImage

app = typer.Typer(help="Make pictures from a prompt or from a file of prompts.")


@app.command()
@with_loading
@with_options(*DRAWING, SearchSettings)
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What to draw.", show_default=False)] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="A .png file, or a folder. Default: out.png; with --prompts-file the folder out.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="tiny, tiny-janus, small, small-dc, a folder, or a Hub id. Default: tiny, or the method's: small-dc "
            "with dc, tiny-janus with speculative.",
            show_default=False,
        ),
    ] = None,
    method: MethodOption = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Text file with one prompt per line; a rerun makes the missing pictures.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Pictures per prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Picture i of each prompt uses seed + i.")] = 0,
    drafter: DrafterOption = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the rounds; worth it for many pictures (speculative).")
    ] = False,
    save_tree: searching.SaveTreeOption = False,
    image: searching.ImageOption = None,
    mask: searching.MaskOption = None,
    strength: searching.StrengthOption = None,
    save_map: Annotated[
        bool, typer.Option("--save-map", help="Also write NAME.map.png: where tokens are kept (dynamic chunking).")
    ] = False,
    plan: PlanOption = None,
    accelerate: Annotated[
        str,
        typer.Option(
            help="exact turns on parts that are faster and change no picture beyond rounding (not with search and "
            "speculative, nor with --plan), off nothing."
        ),
    ] = "exact",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: DtypeOption = "auto",
    batch_size: BatchSizeOption = 8,
    batch_invariant: BatchInvariantOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Draw existing pictures again.")] = False,
    as_json: JsonOption = False,
    **_: Any,
) -> None:
    """Make pictures from a prompt or from a file of prompts.

    Each picture gets a JSON file of the same name (settings, seed, versions, statistics). Existing pictures that
    are complete and have the same settings are kept. Ctrl-C leaves complete files only; the same command resumes.
    """
    from fastgen.cli.plan import image_paths, plan_jobs, unfinished_jobs
    from fastgen.io import check_writable, remove_leftovers
    from fastgen.locks import locked_files, locked_folder

    given = SimpleNamespace(**context.params)
    prompts = _check_options(given)
    beginning = searching.beginning_of(method, image, mask, strength)
    target, is_folder = _output(output, prompts_file is not None)
    with contextlib.redirect_stdout(sys.stderr), _group(device) as group:  # libraries print; stdout is for the result
        drawing = prepare(given, prompts, beginning, group.device)
        check_writable(target if is_folder else target.parent)
        paths = image_paths(target, len(prompts), num_images, folder=is_folder)
        jobs = plan_jobs(prompts, seed, drawing.settings, paths, 1 if batch_invariant else batch_size)
        todo: list[Job] | None = None
        if group.is_main:
            context.with_resource(locked_folder(target) if is_folder else locked_files(job.image for job in jobs))
            remove_leftovers(jobs[0].image.parent, {name for job in jobs for name in job.files})
            todo = unfinished_jobs(jobs, overwrite=overwrite, strict=prompts_file is not None)
        todo = group.share(todo)
        own = _own(todo, group)
        stats = _make(jobs, own, drawing) if own else {}
        group.meet()
        for name, reason in stats.get("paths", {}).get("tree", {}).items():
            typer.echo(f"tree {name}" + (f": {reason}" if reason else ""), err=True)
    if group.is_main:
        _report(jobs, todo, drawing, stats, given)


@contextlib.contextmanager
def _group(device: str) -> Iterator[Any]:
    """The processes that share the pictures: those that `torchrun` or `accelerate launch` started, or this one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield _Alone()
        return
    from fastgen.cli.methods import best_device
    from fastgen.evaluation.distributed import Group

    group = Group.from_environment(best_device() if device == "auto" else device)
    with group.reporting():
        yield group


class _Alone:
    """A group of one process, which needs no torch."""

    is_main = True

    def device(self, device: str) -> str:
        return device

    def share(self, value: Any) -> Any:
        return value

    def owns(self, index: int) -> bool:
        return True

    def meet(self) -> None:
        pass


def _own(todo: list[Job], group: Any) -> list[Job]:
    """The part of this process: whole batches, so that pictures are those of one process."""
    batches: dict[str, list[Job]] = {}
    for job in todo:
        batches.setdefault(job.batch.partition("-")[0] or str(job.image), []).append(job)
    return [job for place, batch in enumerate(batches.values()) if group.owns(place) for job in batch]


def _check_options(given: Any) -> list[str]:
    """Check what needs neither torch nor the model; the prompts."""
    from fastgen.checks import check_choice, check_integer
    from fastgen.cli.plan import read_prompts_file

    if (given.prompt is None) == (given.prompts_file is None):
        raise FastgenError("needs a prompt or --prompts-file, and not both")
    check_integer("--num-images", given.num_images, 1)
    check_integer("--seed", given.seed, 0, 2**63 - given.num_images)
    check_integer("--batch-size", given.batch_size, 1)
    check_method_name(given.method)
    check_choice("--accelerate", given.accelerate, ("exact", "off"))
    if given.plan is not None and (given.accelerate == "off" or given.method in ("search", "speculative")):
        other = f"--accelerate {given.accelerate}" if given.accelerate == "off" else f"--method {given.method}"
        raise FastgenError(f"--plan: not with {other}")
    for method in DRAWING:
        method.of(vars(given), option_name)
    searching.check_options(given.method, SearchSettings.of(vars(given), option_name), given.save_tree)
    prompts = [given.prompt] if given.prompt is not None else read_prompts_file(given.prompts_file)
    for text in prompts:
        check_prompt(text)
    if given.num_images * len(prompts) > 10**6:
        raise FastgenError(
            f"--num-images: {given.num_images} of {len(prompts)} prompts is not allowed, needs at most 10**6"
        )
    return prompts


def _report(jobs: list[Job], todo: list[Job], drawing: Drawing, stats: dict[str, Any], given: Any) -> None:
    """Print what there is now, and what of it was there before."""
    from fastgen.cli.plan import other_batches, read_sidecar

    made = {job.image for job in todo}
    kept = [job for job in jobs if job.image not in made]
    if given.save_tree:
        searching.write_missing_trees(kept)
    if kept:
        typer.echo(f"kept {len(kept)} finished pictures (--overwrite makes them again)", err=True)
    if others := other_batches(kept):
        typer.echo(f"note: {others} of them were drawn in other batches; their pixels equal up to rounding", err=True)
    if not given.as_json:
        for job in jobs:
            typer.echo(str(job.image))
        return
    search = drawing.search
    result = {
        "files": [str(job.image) for job in jobs],
        "sidecars": [str(job.sidecar) for job in jobs],
        "seed": given.seed,
        "seeds": [job.seed for job in jobs],
        "kept": len(kept),
        "settings": drawing.settings,
        **({} if search is None else {"scores": [read_sidecar(job)["search"]["score"] for job in jobs]}),
        "stats": {"images": len(todo), **stats},
    }
    typer.echo(json.dumps(result))


def _output(output: Path | None, many: bool) -> tuple[Path, bool]:
    """Where pictures go, and whether that is a folder."""
    path = output if output is not None else Path("out" if many else "out.png")
    if many or path.is_dir() or not path.suffix:
        if path.exists() and not path.is_dir() or path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            raise FastgenError(f"--output: {path} is a file name; pictures of a prompts file need a folder")
        return path, True
    if path.suffix.lower() != ".png":
        raise FastgenError(f"--output: {path} is not allowed, pictures are written as .png")
    return path, False


def _make(jobs: list[Job], todo: list[Job], drawing: Drawing) -> dict[str, Any]:
    """Make the pictures and write those that are missing; what the run did."""
    from fastgen.accounting import account, phase
    from fastgen.cli.notes import quiet_libraries, warnings_shown
    from fastgen.cli.plan import whole_batches
    from fastgen.environment import versions
    from fastgen.pipelines.accelerate import accelerate as turn_on
    from fastgen.pipelines.accelerate.compile_costs import pays_for_compiling
    from fastgen.pipelines.generation import generate_images, unknown_words
    from fastgen.pipelines.loading import load_checkpoint

    quiet_libraries()
    made_with, search, faster, save_map = versions(), drawing.search, drawing.faster, drawing.save_map
    missing, drawn = {job.image for job in todo}, whole_batches(jobs, todo)
    with account() as stats:
        verifier = None if search is None else search.load_verifier(drawing.loading["device"])
        pipe: Any = load_checkpoint(drawing.checkpoint, **drawing.loading)
        if drawing.compile:
            pipe.compile()
        on: Plan | None = None
        if isinstance(faster, str):
            on = turn_on(pipe, compiling=pays_for_compiling(pipe, drawing.call, len(drawn)))
        elif faster is not None:
            on = turn_on(pipe, plan=faster)
        compiled = drawing.compile or (on is not None and "compile" in {part.name for part in on.parts})
        prompts, seeds = [job.prompt for job in drawn], [job.seed for job in drawn]
        with warnings_shown(), progress() as update:
            if unknown := unknown_words(pipe, list(dict.fromkeys(prompts))):
                shown = ", ".join(unknown[:8]) + (" …" if len(unknown) > 8 else "")
                typer.echo(f"note: the model has no token for: {shown}", err=True)
            # The counter of FLOPs does not see into compiled graphs.
            common: dict[str, Any] = {
                **drawing.call,
                "flops": not compiled,
                "callback": lambda at: update("pictures", at.fraction * len(drawn), len(drawn)),
            }
            if search is None:
                found = generate_images(pipe, prompts, seeds, **common, record_steps=save_map)
            else:
                found = searching.searched_pictures(pipe, verifier, search, prompts, seeds, **common)
            for job, picture in zip(drawn, found, strict=True):
                if job.image not in missing:
                    continue
                with phase("save"):
                    extra = [(job.image.with_suffix(".map.png"), _map(pipe, picture))] if save_map else []
                    if search is not None and search.save_tree:
                        extra.append(searching.tree_file(job.image, picture.search or {}, picture.image))
                    _save(job, picture, made_with, extra, on)
                if search is not None:
                    typer.echo(searching.summary(job.image, picture), err=True)
    return stats.as_dict()


def _map(pipe: Any, picture: GeneratedImage) -> bytes:
    """Where the tokens of the picture were, as a PNG."""
    from fastgen.evaluation.chunk_maps import chunk_sheet
    from fastgen.io import encode_png

    return encode_png(chunk_sheet(pipe.vae, picture.steps or (), picture.image, picture.sample), {})


def _save(
    job: Job, picture: GeneratedImage, versions: dict[str, str], extra: list[tuple[Path, bytes]], on: Plan | None
) -> None:
    """Picture and sidecar, both or neither; the picture last, because its presence means that both are there."""
    from fastgen.cli.plan import SIDECAR_FORMAT
    from fastgen.contracts import weakest
    from fastgen.io import atomic_write_many, encode_json, encode_png

    # Only what the pixels depend on goes into the picture, so that equal pictures are equal files.
    text = json.dumps(job.settings, ensure_ascii=False, sort_keys=True)
    image = encode_png(picture.image, {"Software": "fastgen", "Comment": text})
    sidecar = {
        "format": SIDECAR_FORMAT,
        "file": job.image.name,
        "sha256": hashlib.sha256(image).hexdigest(),
        "prompt": job.prompt,
        "seed": job.seed,
        "settings": job.settings,
        "batch": job.batch,
        "loss": weakest((picture.loss, "exact" if on is None else on.loss)),
        "versions": versions,
        "stats": {**picture.record, **_turned_on(on)},
    }
    if picture.search is not None:
        sidecar |= {"interrupted": picture.interrupted, "preview": not picture.search["finished"]}
        sidecar["search"] = picture.search
    atomic_write_many([*extra, (job.sidecar, encode_json(sidecar)), (job.image, image)])


def _turned_on(plan: Plan | None) -> dict[str, Any]:
    """Each part of `accelerate`: on, or why it is off."""
    if plan is None:
        return {}
    said = {row.part.name: f"on{f': {row.why}' if row.why else ''}" if row.on else row.why for row in plan.rows}
    return {"accelerate": said}
