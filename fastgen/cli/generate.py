"""`fastgen generate`: pictures from a prompt or from a file of prompts, each with a JSON sidecar."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.cli import pictures
from fastgen.cli import search as searching
from fastgen.cli.methods import (
    METHODS,
    VariantOption,
    best_device,
    check_method,
    check_method_name,
    find_model,
    read_plan,
)
from fastgen.errors import FastgenError

if TYPE_CHECKING:
    from fastgen.cli.plan import Job
    from fastgen.pipelines.accelerate import Plan
    from fastgen.pipelines.checkpoint import Checkpoint
    from fastgen.pipelines.generation import GeneratedImage, Progress

app = typer.Typer(help="Make pictures from a prompt or from a file of prompts.")


@app.command()
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
            help="tiny, tiny-janus, tiny-dc, a folder, or a Hub id. Default: tiny, or the method's: tiny-dc with dc, "
            "tiny-janus with speculative.",
            show_default=False,
        ),
    ] = None,
    variant: VariantOption = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="A class of diffusers in place of the model's own, e.g. DPMSolverMultistep.", show_default=False
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="PATH or PATH:WEIGHT: a .safetensors file, a folder or a Hub id; repeat.", show_default=False
        ),
    ] = None,
    offload: Annotated[
        str,
        typer.Option(
            help="none; model, group or sequential keep weights in main memory until a GPU needs them; auto takes the "
            "first that fits."
        ),
    ] = "none",
    vae_tiling: Annotated[
        bool, typer.Option("--vae-tiling", help="Decode in tiles, for large pictures in little memory.")
    ] = False,
    method: Annotated[
        str | None,
        typer.Option(
            help="base, dc (dynamic chunking), speculative (decoding of image tokens) or search (for the noise whose "
            "picture a verifier scores best). Default: the model's own.",
            show_default=False,
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Text file with one prompt per line; a rerun makes the missing pictures.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Pictures per prompt.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps (diffusion). Default: the model's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the model's.")] = None,
    seed: Annotated[int, typer.Option(help="Picture i of each prompt uses seed + i.")] = 0,
    height: Annotated[int | None, typer.Option(help="Pixels. Default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. Default: the model's.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw (diffusion).")] = None,
    temperature: Annotated[float | None, typer.Option(help="Temperature of token sampling (autoregressive).")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens (autoregressive).")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest mass p (autoregressive).")] = None,
    tail_drop: Annotated[
        float | None, typer.Option(help="Share of the natural tokens to drop, 0 to below 1 (dynamic chunking).")
    ] = None,
    uncond_tail_drop: Annotated[
        float | None, typer.Option(help="The same for the unconditional branch, Lite-CFG (dynamic chunking).")
    ] = None,
    token_budget: Annotated[
        int | None, typer.Option(help="Exact number of image tokens, in place of tail drops (dynamic chunking).")
    ] = None,
    tree: Annotated[
        str | None,
        typer.Option(
            help="What a round drafts: chain-4 or 4-2-1, a tree; jacobi-12, a window of 12 tokens; "
            "heads-12, one that heads correct; plain, nothing; auto measures and remembers "
            "(speculative). Default: what is fastest here by the model's calibration.",
            show_default=False,
        ),
    ] = None,
    drafter: Annotated[
        str | None,
        typer.Option(
            help="A folder or a Hub id; none decodes without one. Default: the model's own (speculative).",
            show_default=False,
        ),
    ] = None,
    acceptance: Annotated[
        str | None,
        typer.Option(help="Acceptance rule: exact, lantern, lantern++, gsd, cool-sd, cascade … (speculative)."),
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(
            help="Quality of acceptance rule cascade: 0 (exact) to 1 (fastest), as calibrated (speculative)."
        ),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the rounds; worth it for many pictures (speculative).")
    ] = False,
    policy: searching.PolicyOption = None,
    verifier: searching.VerifierOption = None,
    max_nfe: searching.MaxNfeOption = None,
    max_seconds: searching.MaxSecondsOption = None,
    target_score: searching.TargetScoreOption = None,
    sampler: searching.SamplerOption = None,
    tau: searching.TauOption = None,
    starts: searching.StartsOption = None,
    chains: searching.ChainsOption = None,
    explore: searching.ExploreOption = None,
    explore_uncond: searching.ExploreUncondOption = None,
    preview: searching.PreviewOption = None,
    save_tree: searching.SaveTreeOption = False,
    image: pictures.ImageOption = None,
    mask: pictures.MaskOption = None,
    strength: pictures.StrengthOption = None,
    save_map: Annotated[
        bool, typer.Option("--save-map", help="Also write NAME.map.png: where tokens are kept (dynamic chunking).")
    ] = False,
    plan: Annotated[
        Path | None,
        typer.Option(help="What `fastgen tune` found to make the model faster here.", show_default=False),
    ] = None,
    accelerate: Annotated[
        str,
        typer.Option(
            help="exact turns on what changes no picture beyond rounding, off nothing; auto is exact on a GPU, off on "
            "a CPU. Without --plan."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Most pictures per batch.")] = 8,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant/--fast-batches",
            help="Pixels that do not depend on the batch, or faster batches with pixels equal up to rounding.",
        ),
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make pictures again that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")] = False,
) -> None:
    """Make pictures from a prompt or from a file of prompts.

    Each picture gets a JSON file of the same name beside it (settings, seed, versions, what the run did). Pictures
    that are there already, whole and made with the same settings, are kept. Ctrl-C leaves whole files only; the same
    command goes on from there.
    """
    from fastgen.checks import check_choice
    from fastgen.cli.plan import image_paths, model_digest, plan_jobs, read_prompts_file, read_sidecar, unfinished_jobs
    from fastgen.io import check_writable, remove_leftovers
    from fastgen.locks import locked_files, locked_folder
    from fastgen.pipelines.arguments import SEARCH_SETTINGS, SETTINGS, check_prompt, check_value

    # 1. What needs neither torch nor the model.
    if (prompt is None) == (prompts_file is None):
        raise FastgenError("needs a prompt or --prompts-file, and not both")
    if num_images < 1:
        raise FastgenError(f"--num-images: {num_images} is not allowed, needs an integer >= 1")
    if not 0 <= seed <= 2**63 - num_images:
        raise FastgenError(f"--seed: {seed} is not allowed, needs an integer from 0 to 2**63 - 1")
    if batch_size < 1:
        raise FastgenError(f"--batch-size: {batch_size} is not allowed, needs an integer >= 1")
    check_method_name(method)
    check_choice("--accelerate", accelerate, ("auto", "off", "exact"))
    if plan is not None and (accelerate != "auto" or method in ("search", "speculative")):
        other = f"--accelerate {accelerate}" if accelerate != "auto" else f"--method {method}"
        raise FastgenError(f"--plan: not with {other}")
    asked = {name: context.params[name] for name in SETTINGS}
    for name, value in asked.items():
        if value is not None:
            check_value(f"--{name.replace('_', '-')}", name, value)
    sought = {name: context.params[name] for name in SEARCH_SETTINGS}
    searching.check_options(method, sought, save_tree)
    beginning = pictures.read_beginning(method, image, mask, strength)
    prompts = [prompt] if prompt is not None else read_prompts_file(prompts_file or Path())
    for text in prompts:
        check_prompt(text)
    if num_images * len(prompts) > 10**6:
        raise FastgenError(f"--num-images: {num_images} of {len(prompts)} prompts is not allowed, needs at most 10**6")
    target, is_folder = _output(output, prompts_file is not None)

    # 2. What needs the model's configuration, but not its weights.
    from fastgen.pipelines.checkpoint import check_names, find_drafter
    from fastgen.pipelines.load_options import LoadOptions

    check_names("cpu" if device == "auto" else device, dtype)
    model = model if model is not None else METHODS[method or "base"]
    options = LoadOptions.of(scheduler, lora, offload, vae_tiling)
    checkpoint = find_model(model, variant, revision)
    is_chunked = checkpoint.has_dynamic_chunking
    check_method(method, checkpoint)
    if save_map and method == "search":
        raise FastgenError("--save-map: not with --method search")
    if save_map and not is_chunked:
        raise FastgenError(f"--save-map: model {model!r} has no dynamic chunking, there is no map")
    if checkpoint.fixed_size is None:
        checkpoint.check_size(height, width)
    if method != "speculative" and (drafter is not None or compile):
        raise FastgenError(f"--{'compile' if drafter is None else 'drafter'}: needs --method speculative")
    drafts = find_drafter(checkpoint, drafter) if method == "speculative" else None
    with contextlib.redirect_stdout(sys.stderr):  # libraries print; stdout is for the result
        from fastgen.pipelines.loading import resolve_device
        from fastgen.pipelines.settings import check_classes, pipeline_class, resolve_settings

        begins = None if beginning is None else "mask_image" if beginning.masked else "image"
        kind = pipeline_class(checkpoint, method, begins)
        call = resolve_settings(kind, checkpoint, asked)
        check_classes(checkpoint, prompts)
        search = None
        if method == "search":
            search = searching.plan_search(checkpoint, kind, call, sought, save_tree, beginning)
        if method == "speculative":
            from fastgen.pipelines.speculative_files import check_speculative_files

            check_speculative_files(checkpoint, drafts, call.get("tree"), quality)
        where, weights = resolve_device(best_device() if device == "auto" else device, dtype)
        options.check(kind, checkpoint.index, where)
        faster = _faster(plan, accelerate, kind, where, method)
        check_writable(target if is_folder else target.parent)
        weight_type = str(weights).removeprefix("torch.")
        settings: dict[str, Any] = {
            "model": model,
            "weights": model_digest(checkpoint, drafts),
            **({} if variant is None else {"variant": variant}),
            **options.recorded,
            "method": method or ("dc" if is_chunked else "base"),
            **{name: call.get(name) for name in asked},
            **({"drafter": drafter or ("none" if drafts is None else "own")} if method == "speculative" else {}),
            **({"compile": True} if compile else {}),
            **_recorded(faster),
            **({} if search is None else search.settings),
            "device": where.type,
            "dtype": weight_type,
            "batch_invariant": batch_invariant,
        }
        jobs = plan_jobs(prompts, seed, settings, image_paths(target, len(prompts), num_images, folder=is_folder))
        context.with_resource(locked_folder(target) if is_folder else locked_files(job.image for job in jobs))
        remove_leftovers(jobs[0].image.parent, {name for job in jobs for name in job.files})
        todo = unfinished_jobs(jobs, overwrite=overwrite, strict=prompts_file is not None)
        loading: dict[str, Any] = {
            "device": str(where),
            "dtype": weight_type,
            "method": method,
            "drafter": drafter,
            "options": options,
            "begins": begins,
        }
        stats = _make(todo, checkpoint, loading, compile, call, batch_size, batch_invariant, save_map, search, faster)
        for name, reason in stats.get("paths", {}).get("tree", {}).items():
            typer.echo(f"tree {name}" + (f": {reason}" if reason else ""), err=True)

    made = {job.image for job in todo}
    kept = [job for job in jobs if job.image not in made]
    if save_tree:
        searching.write_missing_trees(kept)
    if kept:
        typer.echo(f"kept {len(kept)} finished pictures (--overwrite makes them again)", err=True)
    if as_json:
        result = {
            "files": [str(job.image) for job in jobs],
            "sidecars": [str(job.sidecar) for job in jobs],
            "seed": seed,
            "seeds": [job.seed for job in jobs],
            "kept": len(kept),
            "settings": settings,
            **({} if search is None else {"scores": [read_sidecar(job)["search"]["score"] for job in jobs]}),
            "stats": {"images": len(todo), **stats},
        }
        typer.echo(json.dumps(result))
    else:
        for job in jobs:
            typer.echo(str(job.image))


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


def _faster(path: Path | None, accelerate: str, kind: type, device: Any, method: str | None) -> Plan | str | None:
    """The plan to follow, "exact" for what is exact and pays, or None.

    Raises:
        FastgenError: a plan of another pipeline, or a broken one.
    """
    if path is not None:
        return read_plan(path, kind, method)
    if method in ("search", "speculative") or accelerate == "off" or (accelerate == "auto" and device.type == "cpu"):
        return None
    return "exact"


def _recorded(faster: Plan | str | None) -> dict[str, Any]:
    """What of it the pixels depend on."""
    if faster is None:
        return {}
    if isinstance(faster, str):
        return {"accelerate": faster}
    return {"plan": [[part.name, part.settings] for part in faster.parts]}


def _make(
    jobs: list[Job],
    checkpoint: Checkpoint,
    loading: dict[str, Any],
    compile: bool,
    call: dict[str, Any],
    batch_size: int,
    batch_invariant: bool,
    save_map: bool,
    search: searching.Search | None,
    faster: Plan | str | None,
) -> dict[str, Any]:
    """Make and write the pictures; what the run did."""
    if not jobs:
        return {}
    from fastgen.accounting import account, phase
    from fastgen.cli.notes import quiet_libraries, warnings_shown
    from fastgen.environment import versions
    from fastgen.pipelines.accelerate import accelerate as turn_on
    from fastgen.pipelines.generation import generate_images, unknown_words
    from fastgen.pipelines.loading import load_checkpoint

    quiet_libraries()
    made_with = versions()
    with account() as stats:
        verifier = None if search is None else search.load_verifier(loading["device"])
        pipe: Any = load_checkpoint(checkpoint, **loading)
        if compile:
            pipe.compile()
        on = None if faster is None else turn_on(pipe, plan=None if isinstance(faster, str) else faster)
        prompts = [job.prompt for job in jobs]
        with warnings_shown(), _progress_bar(len(jobs)) as report:
            if unknown := unknown_words(pipe, list(dict.fromkeys(prompts))):
                shown = ", ".join(unknown[:8]) + (" …" if len(unknown) > 8 else "")
                typer.echo(f"note: the model has no token for: {shown}", err=True)
            common: dict[str, Any] = {
                **call,
                "batch_size": batch_size,
                "batch_invariant": batch_invariant,
                "flops": not compile,  # the counter does not see into compiled graphs
                "callback": report,
            }
            seeds = [job.seed for job in jobs]
            if search is None:
                pictures = generate_images(pipe, prompts, seeds, **common, record_steps=save_map)
            else:
                pictures = searching.searched_pictures(pipe, verifier, search, prompts, seeds, **common)
            for job, picture in zip(jobs, pictures, strict=True):
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
    """Picture and sidecar, both or neither; the picture last, because it is what tells that both are there."""
    from fastgen.contracts import weakest
    from fastgen.io import atomic_write_many, encode_json, encode_png

    # Only what the pixels depend on goes into the picture, so that equal pictures are equal files.
    text = json.dumps(job.settings, ensure_ascii=False, sort_keys=True)
    image = encode_png(picture.image, {"Software": "fastgen", "Comment": text})
    sidecar = {
        "file": job.image.name,
        "sha256": hashlib.sha256(image).hexdigest(),
        "prompt": job.prompt,
        "seed": job.seed,
        "settings": job.settings,
        "loss": weakest((picture.loss, "exact" if on is None else on.loss)),
        "versions": versions,
        "stats": {**picture.stats, **_turned_on(on)},
    }
    if picture.search is not None:
        sidecar |= {"interrupted": picture.interrupted, "preview": not picture.search["finished"]}
        sidecar["search"] = picture.search
    atomic_write_many([*extra, (job.sidecar, encode_json(sidecar)), (job.image, image)])


def _turned_on(plan: Plan | None) -> dict[str, Any]:
    """Each part of `accelerate`: on, or why it is off."""
    return {} if plan is None else {"accelerate": {row.part.name: "on" if row.on else row.why for row in plan.rows}}


@contextlib.contextmanager
def _progress_bar(images: int) -> Iterator[Callable[[Progress], None]]:
    """A bar with the time left on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("pictures"), BarColumn(), TextColumn("{task.fields[done]}"), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0, done=f"0/{images}")

        def report(progress: Progress) -> None:
            bar.update(task, completed=progress.fraction, done=f"{progress.images_done}/{images}")

        yield report
