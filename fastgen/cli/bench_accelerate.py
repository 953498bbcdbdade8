"""`fastgen bench accelerate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgen.cli.methods import VariantOption, check_device, find_model, read_plan
from fastgen.cli.notes import measuring
from fastgen.cli.publish import DeviceOption, DtypeOption, JsonOption, OutOption, check_files, publish, report

__all__ = ["accelerate"]


def accelerate(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="An embedded model, a folder, or a Hub id.")] = "tiny",
    variant: VariantOption = None,
    plan: Annotated[list[Path] | None, typer.Option(help="Plan of `fastgen tune`; repeat for several.")] = None,
    share: Annotated[
        list[float] | None, typer.Option(help="Share of the steps to compare with; repeat. Default: .85 .7 .55 .4 .3.")
    ] = None,
    metric: Annotated[str, typer.Option(help="As in `fastgen tune`.")] = "shapes",
    prompts_file: Annotated[
        Path | None, typer.Option(help="UTF-8, one prompt per line. Default: ShapesWorld's.", show_default=False)
    ] = None,
    images: Annotated[int, typer.Option(help="Pictures of each plan; prompts are repeated with other seeds.")] = 360,
    minutes: Annotated[float, typer.Option(help="Time limit in minutes; no new round starts after it.")] = 60.0,
    steps: Annotated[int | None, typer.Option(help="Default: the model's.", show_default=False)] = None,
    log: Annotated[Path, typer.Option(help="Finished rounds; a killed benchmark resumes from it.")] = Path(
        "fastgen-bench-accelerate.jsonl"
    ),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Exact parts, plans and fewer steps: seconds and score, drawn in turns with the stock pipeline."""
    from fastgen.checks import check_integer, check_number
    from fastgen.cli.plan import model_digest, read_prompts_file
    from fastgen.evaluation.tuning import SHARES
    from fastgen.locks import locked_files
    from fastgen.pipelines.accelerate import accelerated
    from fastgen.pipelines.accelerate.parts import FewerSteps
    from fastgen.pipelines.schema import SCHEMA
    from fastgen.pipelines.settings import pipeline_class

    check_integer("--images", images, 3)
    check_number("--minutes", minutes, above=0)
    if steps is not None:
        SCHEMA["steps"].check("--steps", steps)
    rivals = [FewerSteps(each) for each in share or SHARES]
    check_device(device, dtype)
    checkpoint = find_model(model, variant)
    kind = pipeline_class(checkpoint)
    plans = [tuple(read_plan(path, kind, None, checkpoint).parts) for path in plan or ()]
    texts = read_prompts_file(prompts_file) if prompts_file is not None else _shapes_prompts()
    texts = [texts[i % len(texts)] for i in range(images)]
    check_files(out, log)
    context.with_resource(locked_files([log]))
    with measuring() as notes:
        from fastgen.evaluation.benchmarks.accelerate import accelerate_markdown, benchmark_accelerate
        from fastgen.evaluation.tune_metrics import load_metric
        from fastgen.pipelines.loading import load_checkpoint

        scorer = load_metric(metric, texts, device)
        pipe: Any = load_checkpoint(checkpoint, device=device, dtype=dtype)
        with accelerated(pipe) as turned_on:
            exact = tuple(turned_on.parts)
        result = benchmark_accelerate(
            pipe,
            [exact, *((each,) for each in rivals), *plans],
            texts,
            scorer,
            {"steps": steps, "batch_size": 1},
            log,
            {"model": model, "weights": model_digest(checkpoint), "device": device, "dtype": dtype, "metric": metric},
            time.monotonic() + 60 * minutes,
            report,
        )
    publish(result, out, as_json, accelerate_markdown(result), notes.texts)


def _shapes_prompts() -> list[str]:
    """ShapesWorld's evaluation prompts, one of each task after the other, so that any first part is balanced."""
    from fastgen.evaluation.shapesworld import shapes_prompts

    tasks: dict[str, list[str]] = {}
    for item in shapes_prompts():
        tasks.setdefault(item.tag, []).append(item.prompt)
    return [prompt for row in zip(*tasks.values(), strict=True) for prompt in row]
