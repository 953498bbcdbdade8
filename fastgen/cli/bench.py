"""`fastgen bench`: measurements, printed as a table and written as JSON."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgen.cli.bench_accelerate import accelerate
from fastgen.cli.bench_search import search
from fastgen.cli.methods import VariantOption, check_device, find_model, variant_option
from fastgen.cli.notes import measuring
from fastgen.cli.publish import DeviceOption, DtypeOption, JsonOption, OutOption, check_files, publish, report
from fastgen.errors import FastgenError

app = typer.Typer(help="Measure speed and memory; writes JSON.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure speed and memory; writes JSON."""


app.command("accelerate")(accelerate)
app.command("search")(search)


@app.command("generate")
def generate(
    model: Annotated[list[str] | None, typer.Option(help="Repeat for several. Default: tiny and tiny-janus.")] = None,
    variant: VariantOption = None,
    out: OutOption = None,
    runs: Annotated[int, typer.Option(help="Measured runs of each row.")] = 5,
    batch: Annotated[list[int] | None, typer.Option(help="Pictures per call; repeat. Default: 1 and 8.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps (diffusion).")] = 8,
    cold: Annotated[bool, typer.Option("--cold/--no-cold", help="Measure cold starts.")] = True,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Cold start, seconds per picture and per step, memory."""
    from fastgen.checks import check_integer

    models, batches = model or ["tiny", "tiny-janus"], batch or [1, 8]
    check_integer("--runs", runs, 1)
    check_integer("--batch", min(batches), 1)
    check_integer("--steps", steps, 1)
    check_device(device, dtype)
    for name in models:
        find_model(name, variant)
    check_files(out)
    with measuring() as notes:
        from fastgen.evaluation.benchmarks.generate import benchmark_generate
        from fastgen.evaluation.results_page import generate_markdown

        result = benchmark_generate(
            models,
            variant=variant,
            runs=runs,
            batches=batches,
            steps=steps,
            cold=cold,
            device=device,
            dtype=dtype,
            report=report,
        )
    publish(result, out, as_json, generate_markdown(result), notes.texts)


@app.command("dc")
def dc(
    model: Annotated[
        str, typer.Option(help="Z-Image pipeline with dynamic chunking: name, folder or Hub id.")
    ] = "small-dc",
    dense: Annotated[str, typer.Option(help="Its baseline without: name, folder or Hub id.")] = "small",
    variant: VariantOption = None,
    folder: Annotated[Path, typer.Option(help="Folder of the pictures; a killed run continues there.")] = Path(
        "fastgen-bench-dc"
    ),
    tail_drop: Annotated[
        list[float] | None, typer.Option(help="Of both branches; repeat for several. Default: 0.1.")
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(help="Denoising steps in addition to the models' own; repeat. Default: 4, 6, 8, 12 and 20."),
    ] = None,
    guidance_scale: Annotated[
        list[float] | None, typer.Option(help="Guidance in addition to the models' own; repeat.")
    ] = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Step caches of the dense model.")] = True,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="About six minutes on two idle cores: the main rows, 10 prompts of each task, one image a prompt.",
        ),
    ] = False,
    images_per_prompt: Annotated[int | None, typer.Option(help="Images a prompt. Default: 4.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N prompts of each task.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Pictures drawn together, in timed calls too. Default: 4 on a CPU, else 32.")
    ] = None,
    runs: Annotated[int | None, typer.Option(help="Timed rounds. Default: 5, or 3 with --quick.")] = None,
    device: DeviceOption = "cpu",
    plot: Annotated[Path | None, typer.Option(help="PNG of score against FLOPs and seconds (extra: report).")] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """ShapesWorld-GenEval and FD-shapes against FLOPs and seconds: dynamic chunking against a dense model with fewer
    steps and step caches."""

    check_device(device)
    for name in (model, dense):
        find_model(name, variant)
    check_files(out, folder=folder, plot=plot)
    with measuring() as notes:
        from dataclasses import replace

        from fastgen.evaluation.benchmarks.dc_quality import benchmark_dc_quality
        from fastgen.evaluation.benchmarks.dc_variants import FULL, QUICK
        from fastgen.evaluation.dc_results import dc_quality_markdown, dc_quality_plot

        asked: dict[str, Any] = {"tail_drops": tail_drop, "steps": steps, "guidance_scales": guidance_scale}
        choice = replace(QUICK if quick else FULL, **{name: value for name, value in asked.items() if value})
        result = benchmark_dc_quality(
            model,
            dense,
            folder,
            model_variant=variant,
            choice=choice,
            peers=peers,
            images_per_prompt=(1 if quick else 4) if images_per_prompt is None else images_per_prompt,
            limit=10 if quick and limit is None else limit,
            batch_size=batch_size,
            timed_prompts=4 if quick else 24,
            runs=(3 if quick else 5) if runs is None else runs,
            device=device,
            report=report,
        )
        if plot is not None:
            dc_quality_plot(result, plot)
    publish(result, out, as_json, dc_quality_markdown(result), notes.texts)


@app.command("speculative")
def speculative(
    model: Annotated[str, typer.Option(help="A model that draws tokens.")] = "tiny-janus",
    model_variant: Annotated[str | None, variant_option("--model-variant")] = None,
    drafter: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a drafter, for variants with trees; repeat. Default: the model's own."),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help='"RULE DRAFT [SETTING=VALUE …]", e.g. "gsd jacobi-12 group=3" or "exact 4-2-1@FOLDER"; repeat. '
            "Default: exact windows, CASCADE, LANTERN++ and GSD, as far as the model has heads and a calibration."
        ),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Folder of the pictures; a killed run continues there.")] = Path(
        "fastgen-bench-speculative"
    ),
    quality: Annotated[bool, typer.Option("--quality/--no-quality", help="Score the evaluation set as well.")] = True,
    images_per_prompt: Annotated[int, typer.Option(help="Images a prompt.")] = 4,
    limit: Annotated[int | None, typer.Option(help="Only the first N prompts of each task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Batch size of the evaluation set.")] = 32,
    timed_prompts: Annotated[int, typer.Option(help="Pictures of a timed round, drawn one by one.")] = 6,
    runs: Annotated[int, typer.Option(help="Timed rounds.")] = 3,
    device: DeviceOption = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Type of the variants' weights; auto: bfloat16 where it is native.")
    ] = "auto",
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the rounds.")] = True,
    batch: Annotated[
        list[int] | None, typer.Option(help="Also measure pictures a minute at this batch size; repeat.")
    ] = None,
    commands: Annotated[
        int, typer.Option(help="Also time this many whole generate commands, against the plain loop's.")
    ] = 0,
    plot: Annotated[Path | None, typer.Option(help="PNG of speed against score (extra: report).")] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Passes, seconds, accepted length and quality of speculative decoding, for rules, drafts and trees."""
    from fastgen.checks import check_choice, check_integer
    from fastgen.drafters.names import RULES
    from fastgen.pipelines.loading.checkpoint import find_drafter

    check_device(device, dtype)
    checkpoint = find_model(model, model_variant)
    names = [path.name for path in drafter or []]
    if twice := [name for name in names if names.count(name) > 1]:
        raise FastgenError(f"--drafter: {twice[0]!r} names two folders; their names must differ")
    for path in drafter or []:
        find_drafter(checkpoint, path)
    for size in batch or []:
        check_integer("--batch", size, 1)
    check_integer("--commands", commands, 0)
    for text in variant or []:
        if len(text.split()) < 2:
            raise FastgenError(f"--variant: {text!r} is not allowed, needs RULE DRAFT")
        check_choice("--variant", text.split()[0], RULES)
    check_files(out, folder=folder, plot=plot)
    with measuring() as notes:
        from fastgen.evaluation.benchmarks.speculative import benchmark_speculative
        from fastgen.evaluation.speculative_results import speculative_markdown, speculative_plot

        result = benchmark_speculative(
            model,
            folder,
            model_variant=model_variant,
            drafters=None if drafter is None else {path.name: path for path in drafter},
            variants=variant or None,
            quality=quality,
            images_per_prompt=images_per_prompt,
            limit=limit,
            batch_size=batch_size,
            timed_prompts=timed_prompts,
            runs=runs,
            device=device,
            dtype=dtype,
            compile=compile,
            batches=batch or (),
            commands=commands,
            report=report,
        )
        if plot is not None:
            speculative_plot(result, plot)
    publish(result, out, as_json, speculative_markdown(result), notes.texts)


@app.command("speculative-cost")
def speculative_cost(
    size: Annotated[
        list[str] | None, typer.Option(help="janus-pro-1b, janus-pro-7b, llamagen-xl; repeat. Default: all.")
    ] = None,
    nodes: Annotated[list[int] | None, typer.Option(help="Tokens of a pass; repeat. Default: 1, 2, 4 … 64.")] = None,
    runs: Annotated[int, typer.Option(help="Measured rounds.")] = 20,
    device: DeviceOption = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "bfloat16",
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile passes and rounds; on a GPU, replay them as CUDA graphs. Default: on a GPU only.",
        ),
    ] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """What rounds of speculative decoding cost at real sizes with random weights, and what they give by source, with
    the tokens per pass that tiny-janus accepts."""

    check_device(device, dtype)
    check_files(out)
    from fastgen.evaluation.benchmarks.speculative_cost import NODES, SIZES, benchmark_speculative_cost
    from fastgen.evaluation.speculative_results import speculative_cost_markdown

    result = benchmark_speculative_cost(
        size or SIZES,
        nodes or NODES,
        runs=runs,
        device=device,
        dtype=dtype,
        compile=compile,
        report=report,
    )
    publish(result, out, as_json, speculative_cost_markdown(result))


@app.command("dc-speed")
def dc_speed(
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="MODEL@PIXELS, a DiT (S, B, L, XL) or z-image; repeat. Default: XL@512, z-image@1024, z-image@2048."
        ),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Samples of a forward pass; repeat. Default: 1.")] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(help="Kept tokens, as a share of the dense model's; repeat. Default: .5 and .25."),
    ] = None,
    runs: Annotated[int, typer.Option(help="Most measured rounds.")] = 5,
    seconds: Annotated[float, typer.Option(help="After which a size begins no further round.")] = 150.0,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Also with compiled blocks.")] = True,
    whole: Annotated[
        bool | None,
        typer.Option(
            "--whole/--extrapolate", help="Whole models, or a block of each kind. Default: whole ones on a GPU."
        ),
    ] = None,
    device: DeviceOption = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "bfloat16",
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forward time and FLOPs of dynamic chunking against the dense model, at real sizes with random weights."""

    check_device(device, dtype)
    check_files(out)
    from fastgen.evaluation.benchmarks.dc_speed import SHARES, SIZES, benchmark_dc_speed
    from fastgen.evaluation.dc_results import dc_markdown

    result = benchmark_dc_speed(
        size or SIZES,
        batch or (1,),
        share or SHARES,
        runs=runs,
        seconds=seconds,
        compile=compile,
        whole=whole,
        device=device,
        dtype=dtype,
        report=report,
    )
    publish(result, out, as_json, dc_markdown(result))


@app.command("serve")
def serve(
    model: Annotated[str, typer.Option(help="Model to serve: name, folder or Hub id.")] = "tiny",
    variant: VariantOption = None,
    rounds: Annotated[int, typer.Option(help="Measured rounds.")] = 5,
    pictures: Annotated[int, typer.Option(help="Pictures of a round.")] = 24,
    minutes: Annotated[
        float, typer.Option(help="Then keep eight clients busy for this long, and compare every picture.")
    ] = 0.0,
    replicas: Annotated[
        int, typer.Option(help="Replicas of Ray Serve to draw on; one is killed every minute of that load.")
    ] = 0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """What `fastgen serve` gains by shared batches, and whether it stays right under load."""
    from fastgen.cli.serve import check_libraries

    check_libraries(ray=replicas > 0)
    find_model(model, variant)
    check_files(out)
    with measuring() as notes:
        from fastgen.evaluation.benchmarks.serve import benchmark_serve, serve_markdown

        result = benchmark_serve(
            model,
            rounds=rounds,
            pictures=pictures,
            minutes=minutes,
            variant=variant,
            replicas=replicas,
            report=report,
        )
    publish(result, out, as_json, serve_markdown(result), notes.texts)


@app.command("kernels")
def kernels(
    op: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this operation (with --end-to-end: models by the start of their names); repeat for several."
        ),
    ] = None,
    device: DeviceOption = "cpu",
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Measure compiled references.")] = True,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="Steps of whole models with random weights, kernels on and off.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="After this many, references are no longer compiled and no other model is begun.")
    ] = 110.0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fused kernels against their references, eager and compiled, and against the memory's speed."""
    from fastgen.io import atomic_write_json

    check_device(device)
    check_files(out)
    with contextlib.redirect_stdout(sys.stderr):
        from fastgen.evaluation.benchmarks.kernels import benchmark_kernels
        from fastgen.evaluation.kernel_results import kernels_markdown

        result = benchmark_kernels(
            op,
            device=device,
            compile=compile,
            end_to_end=end_to_end,
            seconds=seconds,
            report=report,
            save=lambda result: None if out is None else atomic_write_json(out, result),
        )
    publish(result, out, as_json, kernels_markdown(result))
