"""What dynamic chunking costs and what it saves: ShapesWorld-GenEval and FD-shapes against FLOPs and seconds.

Every variant draws the whole evaluation set into a folder of its own (resumable) and is scored. Seconds are measured
apart from that, in one run: in every round all variants draw the same prompts in turn.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ZImagePipeline
from PIL import Image

from fastgen.accounting import account, count_flops
from fastgen.checks import check_integer
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.measure import percentiles, result_of, take_turns
from fastgen.evaluation.benchmarks.peers import first_block_cache, token_merging
from fastgen.evaluation.benchmarks.quality import score_row
from fastgen.evaluation.benchmarks.router_statistics import router_statistics
from fastgen.evaluation.geneval.shapes_checker import load_detector
from fastgen.evaluation.runner import RunSettings, model_fingerprint, spread
from fastgen.evaluation.shapesworld import shapes_prompts
from fastgen.pipelines.generation import generate_images
from fastgen.pipelines.loading import load_checkpoint
from fastgen.pipelines.loading.checkpoint import Checkpoint, find_checkpoint

TAIL_DROPS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
LITE_CFG = 0.9
# Steps near the data keep most tokens and decide least: nothing is dropped before the last three steps.
LATE = (0.7, 0.95, 0.99)
LATE_LITE_CFG = 0.98
GUIDANCE_SCALES = (2.6, 3.2)
THRESHOLDS = (0.1, 0.3)
MERGED = (0.25, 0.5)


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        name: "dc", "dc lite-cfg", "dense", "dense first-block-cache 0.1" …
        pipe: the pipeline it belongs to.
        fingerprint: of that pipeline's files.
        settings: of `generate_images`.
        adapt: makes the pipeline that draws.
    """

    name: str
    pipe: DiffusionPipeline
    fingerprint: str
    settings: dict[str, Any] = field(default_factory=dict)
    adapt: Callable[[Any], AbstractContextManager[Any]] = nullcontext


def benchmark_dc_quality(
    model: str,
    dense: str,
    folder: Path,
    *,
    model_variant: str | None = None,
    tail_drops: Sequence[float] = TAIL_DROPS,
    guidance_scales: Sequence[float] = GUIDANCE_SCALES,
    peers: bool = True,
    images_per_prompt: int = 4,
    limit: int | None = None,
    batch_size: int = 32,
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
        tail_drops: rho of the rows without Lite-CFG; its rows take 0.9 for the unconditional branch.
        guidance_scales: besides the models' own, for the baseline, all tokens, and the schedule of late drops.
        peers: measure first-block cache and token merging on the baseline as well.
        images_per_prompt, limit: of the evaluation set, see `fastgen eval shapes`.
        batch_size: pictures at once.
        timed_prompts: pictures of a timed call.
        runs: timed rounds after one of warm-up.
        device: where.
        report: called with each line of progress.

    Returns:
        a JSON-ready dict: "environment", "settings", "router" (see `router_statistics`), "flops_beside" (of text
        encoder and decoder, a picture: no method here touches them) and "rows" with variant, tail_drop (a list: one a
        step), uncond_tail_drop, guidance_scale (None: the model's own), flops and seconds a picture, kept share of the
        tokens (of all, and of the first to the last step), score, stderr and fd.

    Raises:
        FastgenError: a number out of range, or a model that does not fit.
    """
    for name, number in (("images_per_prompt", images_per_prompt), ("runs", runs), ("timed_prompts", timed_prompts)):
        check_integer(name, number, 1)
    if not all(0 <= rho < 1 for rho in tail_drops):
        raise FastgenError(f"tail_drops: {list(tail_drops)} is not allowed, needs numbers in [0, 1)")
    if not all(0 <= scale < float("inf") for scale in guidance_scales):
        raise FastgenError(f"guidance_scales: {list(guidance_scales)} is not allowed, needs numbers >= 0")
    checkpoints = [find_checkpoint(name, model_variant) for name in (model, dense)]
    variants = list(_variants(checkpoints, tail_drops, guidance_scales, peers, device))
    prompts = shapes_prompts(limit)
    detector = load_detector(device=device)
    rows: list[dict[str, Any]] = []
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
        judge, _ = scores.pop("detector"), scores.pop("prompts")
        rows.append(
            {
                "variant": variant.name,
                "tail_drop": variant.settings.get("tail_drop"),
                "uncond_tail_drop": variant.settings.get("uncond_tail_drop"),
                "guidance_scale": variant.settings.get("guidance_scale"),
                **scores,
            }
        )
    report("router")
    chunked = next(variant.pipe for variant in variants if variant.name.startswith("dc "))
    router = router_statistics(chunked)
    report("time")
    chosen = [prompts[index].prompt for index in spread(len(prompts), timed_prompts)]
    for row, cost in zip(rows, _costs(variants, chosen, runs), strict=True):
        row |= cost
    settings = {
        "model": model,
        "dense": dense,
        "model_variant": model_variant,
        "images_per_prompt": images_per_prompt,
        "prompts": len(prompts),
        "batch_size": batch_size,
        "timed_prompts": len(chosen),
        "runs": runs,
        "device": device,
    }
    beside = _flops_beside(chunked, checkpoints[0].defaults, chosen[:1])
    return result_of("dc-quality", settings, detector=judge, router=router, flops_beside=beside, rows=rows)


def _variants(
    checkpoints: Sequence[Checkpoint],
    tail_drops: Sequence[float],
    scales: Sequence[float],
    peers: bool,
    device: str,
) -> Iterator[Variant]:
    chunked, baseline = (load_checkpoint(found, device=device, dtype="float32") for found in checkpoints)
    if "tail_drop" not in inspect.signature(type(chunked).__call__).parameters:
        raise FastgenError(f"model: {checkpoints[0].model} has no dynamic chunking")
    if type(baseline) is not ZImagePipeline:
        raise FastgenError(f"dense: {checkpoints[1].model} is no stock Z-Image pipeline")
    ours, theirs = (model_fingerprint(*found.folders) for found in checkpoints)
    # An adapted pipeline does not know which model it was made of.
    defaults = checkpoints[1].defaults
    yield Variant("dense", baseline, theirs)
    if peers:
        patch = 2 * baseline.vae_scale_factor
        grid = int(defaults["height"]) // patch, int(defaults["width"]) // patch
        for threshold in THRESHOLDS:
            adapt: Callable[[Any], AbstractContextManager[Any]] = partial(first_block_cache, threshold=threshold)
            yield Variant(f"dense first-block-cache {threshold:g}", baseline, theirs, defaults, adapt)
        for ratio in MERGED:
            adapt = partial(token_merging, ratio=ratio, grid=grid)
            yield Variant(f"dense token-merging {ratio:g}", baseline, theirs, defaults, adapt)
    for rho in tail_drops:
        yield Variant(f"dc {rho:g}", chunked, ours, {"tail_drop": rho})
    for rho in tail_drops:
        settings = {"tail_drop": rho, "uncond_tail_drop": LITE_CFG}
        yield Variant(f"dc {rho:g} lite-cfg {LITE_CFG:g}", chunked, ours, settings)
    steps = int(checkpoints[0].defaults["steps"])
    late = {"tail_drop": [0.0] * (steps - len(LATE)) + list(LATE)[-steps:], "uncond_tail_drop": LATE_LITE_CFG}
    name = f"dc late lite-cfg {LATE_LITE_CFG:g}"
    yield Variant(name, chunked, ours, late)
    for scale in scales:
        guided = {"guidance_scale": scale}
        yield Variant(f"dense guidance {scale:g}", baseline, theirs, guided)
        yield Variant(f"dc 0 guidance {scale:g}", chunked, ours, {"tail_drop": 0.0, **guided})
        yield Variant(f"{name} guidance {scale:g}", chunked, ours, {**late, **guided})


def _pictures(variant: Variant, batch_size: int, prompts: list[str], seeds: list[int]) -> Iterator[Image.Image]:
    """Pictures of a variant, one after the other."""
    with variant.adapt(variant.pipe) as pipe:
        drawn = generate_images(pipe, prompts, seeds, batch_size=batch_size, batch_invariant=False, **variant.settings)
        yield from (picture.image for picture in drawn)


def _costs(variants: Sequence[Variant], prompts: list[str], runs: int) -> list[dict[str, Any]]:
    """FLOPs, kept share and seconds a picture; the variants take turns."""
    seeds = list(range(len(prompts)))
    counts: list[dict[str, Any]] = []
    for variant in variants:  # a warm-up as well
        with account() as stats, count_flops():
            _draw(variant, prompts, seeds)
        steps = [kept / total for kept, total in zip(stats.kept_tokens, stats.total_tokens, strict=True)]
        kept = sum(steps) / len(steps) if steps else None
        counts.append({"flops": stats.flops / len(prompts), "kept": kept, "kept_by_step": steps or None})
    draws = {place: partial(_draw, variant, prompts, seeds) for place, variant in enumerate(variants)}
    turns = take_turns(draws, runs, warm_up=0).values()
    times = [percentiles([seconds / len(prompts) for seconds in found]) for found in turns]
    return [{**count, "n": runs, "seconds": found} for count, found in zip(counts, times, strict=True)]


def _flops_beside(pipe: Any, defaults: dict[str, Any], prompts: list[str]) -> int:
    """FLOPs of a picture outside the denoiser: the prompt and the empty one are read, and latents decoded."""
    height, width = (int(defaults[side]) // pipe.vae_scale_factor for side in ("height", "width"))
    latents = torch.zeros(1, pipe.vae.config.latent_channels, height, width, device=pipe.device, dtype=pipe.vae.dtype)
    with torch.no_grad(), account() as stats, count_flops():
        pipe.encode_prompt(prompts, do_classifier_free_guidance=True, device=pipe.device)
        pipe.vae.decode(latents)
    return stats.flops


def _draw(variant: Variant, prompts: list[str], seeds: list[int]) -> None:
    for _ in _pictures(variant, len(prompts), prompts, seeds):
        pass
