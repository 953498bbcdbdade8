"""Cost of `fastgen generate`: cold start, seconds per picture and per step, memory, after a check of correctness.

Times are wall-clock seconds. A row gives n measured runs after warm-up runs, and their 20th, 50th and 80th percentile.
"Per step" is the denoising (or token) stage of one call divided by its steps, however many pictures the call made.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastgen.accounting import Stats
from fastgen.checks import check_integer
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.measure import measure_process, percentiles, result_of

PROMPT = "a red circle left of a blue square"
# The stage whose duration is divided by the number of steps, by its name in the statistics.
_STAGES = ("denoise", "tokens")


def benchmark_generate(
    models: Sequence[str] = ("tiny", "tiny-janus"),
    *,
    variant: str | None = None,
    runs: int = 5,
    batches: Sequence[int] = (1, 8),
    steps: int | None = 8,
    cold: bool = True,
    device: str = "cpu",
    dtype: str = "auto",
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        models: names, folders or Hub ids.
        variant: of their weight files, as in diffusers.
        runs: measured runs of each row.
        batches: numbers of pictures per call.
        steps: denoising steps of diffusion models; None takes each model's default.
        cold: measure cold starts as well, each in a new process.
        report: called with each line of progress.

    Returns:
        a JSON-ready dict: "environment", "settings", "cold" (rows) and "warm" (rows).

    Raises:
        FastgenError: an argument outside its range, or pictures that depend on the batch size: a fast wrong answer is
            not worth timing.
    """
    check_integer("runs", runs, 1)
    check_integer("batches", min(batches, default=0), 1)
    cold_rows = []
    if cold:
        report("cold start")
        cold_rows = _cold_rows(models, variant, runs, steps, device, dtype)
    warm_rows = []
    for model in models:
        warm_rows += _warm_rows(model, variant, runs, batches, steps, device, dtype, report)
    settings = {
        "models": list(models),
        "variant": variant,
        "runs": runs,
        "batches": list(batches),
        "steps": steps,
        "device": device,
        "dtype": dtype,
        "prompt": PROMPT,
    }
    return result_of("generate", settings, cold=cold_rows, warm=warm_rows)


# ---- cold ----


def _cold_rows(
    models: Sequence[str], variant: str | None, runs: int, steps: int | None, device: str, dtype: str
) -> list[dict[str, Any]]:
    timed_import = "import time; t = time.perf_counter(); import fastgen; print(time.perf_counter() - t)"
    rows = [_cold_row("import fastgen", [sys.executable, "-c", timed_import], runs, printed_seconds=True)]
    command = [sys.executable, "-m", "fastgen.cli.main"]
    rows.append(_cold_row("fastgen --help", [*command, "--help"], runs))
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            arguments = ["generate", PROMPT, "--model", model, "--overwrite", "--device", device, "--dtype", dtype]
            if steps is not None and _is_diffusion(model):
                arguments += ["--steps", str(steps)]
            arguments += [] if variant is None else ["--variant", variant]
            arguments += ["-o", str(Path(folder, "out.png"))]
            rows.append(_cold_row(f"fastgen generate --model {model}", [*command, *arguments], runs))
    return rows


def _cold_row(name: str, command: list[str], runs: int, printed_seconds: bool = False) -> dict[str, Any]:
    # The first run fills the disk cache and the bytecode cache, which a second user of the machine has as well.
    results = [measure_process(command) for _ in range(runs + 1)]
    seconds = [float(output) if printed_seconds else wall for wall, _, output in results]
    peaks = [peak for _, peak, _ in results if peak is not None]
    return {
        "what": name,
        "n": runs,
        "first_run_seconds": seconds[0],
        "seconds": percentiles(seconds[1:]),
        "peak_rss_bytes": max(peaks, default=None),
    }


def _is_diffusion(model: str) -> bool:
    from fastgen.pipelines.loading.checkpoint import find_checkpoint

    return find_checkpoint(model).kind == "diffusers"


# ---- warm ----


def _warm_rows(
    model: str,
    variant: str | None,
    runs: int,
    batches: Sequence[int],
    steps: int | None,
    device: str,
    dtype: str,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    from fastgen.pipelines.loading import load_pipeline
    from fastgen.pipelines.loading.checkpoint import find_checkpoint
    from fastgen.pipelines.settings import check_classes

    check_classes(find_checkpoint(model, variant), [PROMPT])
    pipe = load_pipeline(model, device=device, dtype=dtype, variant=variant)
    options = {"steps": steps} if steps is not None and _is_diffusion(model) else {}
    report(f"{model}: same pixels for every batch size")
    _check_batches(pipe, options, model)
    rows = []
    for batch in batches:
        for invariant in (True, False) if batch > 1 else (True,):
            report(f"{model}: {batch} pictures, {'batch-invariant' if invariant else 'fast batches'}")
            rows.append({"model": model, **_warm_row(pipe, batch, invariant, options, runs)})
    return rows


def _warm_row(pipe: Any, batch: int, invariant: bool, options: dict[str, Any], runs: int) -> dict[str, Any]:
    start = time.perf_counter()
    _run_once(pipe, batch, invariant, options)
    first = time.perf_counter() - start
    _run_once(pipe, batch, invariant, options)
    walls, per_step = [], []
    stats = Stats()
    for _ in range(runs):
        wall, step_seconds, stats = _run_once(pipe, batch, invariant, options)
        walls.append(wall / batch)
        per_step.append(step_seconds)
    return {
        "batch": batch,
        "batch_invariant": invariant,
        "warm_up": 2,
        "first_run_seconds": first,
        "n": runs,
        "seconds_per_image": percentiles(walls),
        "seconds_per_step": percentiles(per_step),
        "peak_memory_bytes": stats.peak_memory_bytes,
        "paths": stats.paths,
    }


def _run_once(pipe: Any, batch: int, invariant: bool, options: dict[str, Any]) -> tuple[float, float, Stats]:
    """Wall seconds of the batch, seconds per step of one call, statistics of the last call."""
    from fastgen.pipelines.generation import generate_images

    steps_seen = 1

    def count(progress: Any) -> None:
        nonlocal steps_seen
        steps_seen = progress.steps

    start = time.perf_counter()
    pictures = list(
        generate_images(
            pipe,
            [PROMPT] * batch,
            list(range(batch)),
            batch_size=batch,
            batch_invariant=invariant,
            callback=count,
            **options,
        )
    )
    wall = time.perf_counter() - start
    stats = pictures[-1].stats
    return wall, sum(stats.seconds.get(stage, 0.0) for stage in _STAGES) / steps_seen, stats


def _check_batches(pipe: Any, options: dict[str, Any], model: str) -> None:
    from fastgen.pipelines.generation import generate_images

    prompts, seeds = [PROMPT, "a green star", "two white rings"], [0, 1, 2]

    def pixels(batch_size: int) -> list[bytes]:
        pictures = generate_images(pipe, prompts, seeds, batch_size=batch_size, batch_invariant=True, **options)
        return [picture.image.tobytes() for picture in pictures]

    if pixels(1) != pixels(3):
        raise FastgenError(f"model {model!r}: pictures depend on the batch size; not timed")
