"""Quality and cost of dynamic chunking: ShapesWorld-GenEval and FD-shapes against FLOPs and seconds.

Every variant draws the whole evaluation set into its own folder (resumable) and is scored. Seconds are measured
apart from that, in one run: in every round all variants draw the same prompts in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastgen.accounting import account, count_flops
from fastgen.checks import check_integer
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.dc_variants import FULL, Choice, Variant, variants_of
from fastgen.evaluation.benchmarks.measure import percentiles, result_of, take_turns
from fastgen.evaluation.benchmarks.quality import paired_difference, score_row
from fastgen.evaluation.benchmarks.router_statistics import router_statistics
from fastgen.evaluation.geneval.shapes_checker import load_detector
from fastgen.evaluation.runner import RunSettings, spread
from fastgen.evaluation.shapesworld import shapes_prompts
from fastgen.pipelines.generation import generate_images
from fastgen.pipelines.loading.checkpoint import find_checkpoint


def benchmark_dc_quality(
    model: str,
    dense: str,
    folder: Path,
    *,
    model_variant: str | None = None,
    choice: Choice = FULL,
    peers: bool = True,
    images_per_prompt: int = 4,
    limit: int | None = None,
    batch_size: int | None = None,
    timed_prompts: int = 24,
    runs: int = 5,
    device: str = "cpu",
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        model: a pipeline with dynamic chunking.
        dense: its baseline, a stock Z-Image pipeline.
        folder: of the pictures; a killed run continues there.
        model_variant: of the weight files of both models, as in diffusers.
        choice: which rows.
        peers: measure step caches on the baseline as well.
        images_per_prompt, limit: of the evaluation set, see `fastgen eval shapes`.
        batch_size: pictures drawn together, in timed calls too; None: 4 on a CPU, 32 elsewhere.
        timed_prompts: pictures of a timed call.
        runs: timed rounds after one of warm-up.
        device: where.
        report: called with each line of progress.

    Returns:
        a JSON-ready dict: "environment", "settings", "router" (see `router_statistics`), "flops_beside" (of text
        encoder and decoder, a picture: no method here touches them) and "rows" with variant, steps and guidance_scale
        (None: the model's own), tail_drop (a list: one a step), uncond_tail_drop, flops and seconds a picture, kept
        share of the tokens (of all, and of the first to the last step), score, stderr, fd, and "paired": difference of
        the score to the first row's with its 95 % interval, by prompts as pairs.

    Raises:
        FastgenError: a number out of range, or a model that does not fit.
    """
    if batch_size is None:
        batch_size = 4 if device.startswith("cpu") else 32
    check_integer("images_per_prompt", images_per_prompt, 1)
    check_integer("batch_size", batch_size, 1)
    check_integer("timed_prompts", timed_prompts, 1)
    check_integer("runs", runs, 1)
    if not choice.tail_drops or not all(0 <= rho < 1 for rho in choice.tail_drops):
        raise FastgenError(f"tail_drops: {list(choice.tail_drops)} is not allowed, needs numbers in [0, 1)")
    if not all(0 <= scale < float("inf") for scale in choice.guidance_scales):
        raise FastgenError(f"guidance_scales: {list(choice.guidance_scales)} is not allowed, needs numbers >= 0")
    for steps in choice.steps:
        check_integer("steps", steps, 1)
    checkpoints = [find_checkpoint(name, model_variant) for name in (model, dense)]
    prompts = shapes_prompts(limit)
    variants = list(variants_of(checkpoints, choice, peers, device))
    detector = load_detector(device=device)
    rows: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for variant in variants:
        report(variant.name)
        run = RunSettings(
            variant.name,
            variant.fingerprint,
            images_per_prompt,
            device=device,
            batch_size=batch_size,
            variant=model_variant,
        )
        scores = score_row(folder, prompts, run, partial(_pictures, variant, batch_size), detector)
        first = first or dict(scores)
        paired = paired_difference(first, scores) if rows else None
        judge, _ = scores.pop("detector"), scores.pop("prompts")
        rows.append(
            {
                "variant": variant.name,
                "steps": variant.settings.get("steps"),
                "tail_drop": variant.settings.get("tail_drop"),
                "uncond_tail_drop": variant.settings.get("uncond_tail_drop"),
                "guidance_scale": variant.settings.get("guidance_scale"),
                **scores,
                "paired": paired,
            }
        )
    report("router")
    chunked = next(variant.pipe for variant in variants if variant.name.startswith("dc "))
    router = router_statistics(chunked, size=-(-int(checkpoints[0].defaults["height"]) // 64) * 64)
    report("time")
    chosen = [prompts[index].prompt for index in spread(len(prompts), timed_prompts)]
    for row, cost in zip(rows, _costs(variants, chosen, batch_size, runs), strict=True):
        row |= cost
    settings = {
        "model": model,
        "dense": dense,
        "model_variant": model_variant,
        "choice": asdict(choice),
        "images_per_prompt": images_per_prompt,
        "prompts": len(prompts),
        "batch_size": batch_size,
        "timed_prompts": len(chosen),
        "runs": runs,
        "device": device,
    }
    other_flops = _other_flops(chunked, checkpoints[0].defaults, chosen[:1])
    return result_of("dc-quality", settings, detector=judge, router=router, flops_beside=other_flops, rows=rows)


def _pictures(variant: Variant, batch_size: int, prompts: list[str], seeds: list[int]) -> Iterator[Image.Image]:
    """Pictures of a variant, one after the other."""
    with variant.adapt(variant.pipe) as pipe:
        drawn = generate_images(pipe, prompts, seeds, batch_size=batch_size, batch_invariant=False, **variant.settings)
        yield from (picture.image for picture in drawn)


def _costs(variants: Sequence[Variant], prompts: list[str], batch_size: int, runs: int) -> list[dict[str, Any]]:
    """FLOPs, kept share and seconds a picture; the variants take turns."""
    counts: list[dict[str, Any]] = []
    for variant in variants:  # a warm-up as well
        with account() as stats, count_flops():
            _draw(variant, prompts, batch_size)
        steps = [kept / total for kept, total in zip(stats.kept_tokens, stats.total_tokens, strict=True)]
        kept = sum(steps) / len(steps) if steps else None
        counts.append({"flops": stats.flops / len(prompts), "kept": kept, "kept_by_step": steps or None})
    draws = {place: partial(_draw, variant, prompts, batch_size) for place, variant in enumerate(variants)}
    turns = take_turns(draws, runs, warm_up=0).values()
    times = [percentiles([seconds / len(prompts) for seconds in found]) for found in turns]
    return [{**count, "n": runs, "seconds": found} for count, found in zip(counts, times, strict=True)]


def _other_flops(pipe: Any, defaults: dict[str, Any], prompts: list[str]) -> int:
    """FLOPs of a picture outside the denoiser: the prompt and the empty one are read, and latents decoded."""
    height, width = (int(defaults[side]) // pipe.vae_scale_factor for side in ("height", "width"))
    latents = torch.zeros(1, pipe.vae.config.latent_channels, height, width, device=pipe.device, dtype=pipe.vae.dtype)
    with torch.no_grad(), account() as stats, count_flops():
        pipe.encode_prompt(prompts, do_classifier_free_guidance=True, device=pipe.device)
        pipe.vae.decode(latents)
    return stats.flops


def _draw(variant: Variant, prompts: list[str], batch_size: int) -> None:
    for _ in _pictures(variant, batch_size, prompts, list(range(len(prompts)))):
        pass
