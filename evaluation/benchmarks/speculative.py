"""Speculative decoding: accepted length, passes, seconds and quality for rules, drafts and trees.

Seconds are those of one picture at a time, measured in one run in which all variants take turns, against the fastest
of our plain loops (in float32 and in the variants' precision, compiled and not) and the fastest stock `generate`.
Before anything is timed, every lossless variant has to draw the plain loop's very tokens at temperature 0, in float32.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastgen.checks import check_integer
from fastgen.drafters.acceptance import AcceptanceRule
from fastgen.drafters.auto import choose_source
from fastgen.drafters.calibration import Calibration
from fastgen.drafters.decode import Decoded, decode_plain, decode_speculative
from fastgen.drafters.drafter import describe
from fastgen.drafters.heads import WindowHeads
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.loading import load_drafter, load_heads
from fastgen.drafters.sources import DraftSource, TreeSource
from fastgen.drafters.targets import Target, target_of
from fastgen.environment import native_bfloat16
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.measure import measure_process, percentiles, result_of, take_turns
from fastgen.evaluation.benchmarks.quality import paired_difference, score_row
from fastgen.evaluation.benchmarks.speculative_variants import (
    Variant,
    default_source,
    default_variants,
    parse_variant,
)
from fastgen.evaluation.geneval.shapes_checker import load_detector
from fastgen.evaluation.runner import RunSettings, model_fingerprint, spread
from fastgen.evaluation.shapesworld import shapes_prompts
from fastgen.evaluation.verifiers.shapes_verifier import ShapesVerifier
from fastgen.pipelines.loading import load_checkpoint
from fastgen.pipelines.loading.checkpoint import find_checkpoint
from fastgen.pipelines.token_images import as_output

__all__ = ["benchmark_speculative"]


def benchmark_speculative(
    model: str,
    folder: Path,
    *,
    model_variant: str | None = None,
    drafters: Mapping[str, Path] | None = None,
    variants: Sequence[str] | None = None,
    quality: bool = True,
    images_per_prompt: int = 4,
    limit: int | None = None,
    batch_size: int = 32,
    timed_prompts: int = 6,
    runs: int = 3,
    guidance_scale: float | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    compile: bool = True,
    batches: Sequence[int] = (),
    commands: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        model: one that draws tokens.
        folder: of the pictures; a killed run continues there.
        model_variant: of the weight files, as in diffusers.
        drafters: folders of drafters by name, for variants with trees; None takes the model's own.
        variants: see `parse_variant`; None takes the `default_variants`.
        quality: draw the evaluation set with every variant and score it (the model has to be one of ShapesWorld).
        images_per_prompt, limit: of the evaluation set, see `fastgen eval shapes`.
        batch_size: pictures of the evaluation set in one batch.
        timed_prompts: pictures of a timed round, drawn one by one.
        runs: timed rounds, after one of warm-up.
        guidance_scale: None takes the model's.
        device: where.
        dtype: of the variants; "auto" is bfloat16 where the device multiplies it natively. The plain loops and stock
            `generate` run in float32 as well.
        compile: compile the rounds; the plain loop runs both ways.
        batches: also measure pictures a minute at these batch sizes, in turn; images that are done leave.
        commands: also measure this many whole `fastgen generate --method speculative` commands without other options,
            in turn with those of the plain loop.
        report: called with each line of progress.

    Returns:
        a JSON-ready dict: "environment", "settings" and "rows" with variant, rule, drafter, tree, target_pass_ratio,
        seconds a picture, speedup_vs_fastest_plain, speedup_vs_stock, accepted_length (the bonus counted) and
        accepted_without_bonus, stolen (mass a picture), score, stderr, fd, verifier (mean score by
        shapes-verifier), "paired" (difference of the score to the plain loop's with its 95 % interval, by prompts as
        pairs) and "pictures_a_minute" by batch size. The first rows are the plain loops and
        stock `generate`. And "commands" with the seconds of whole commands.

    Raises:
        FastgenError: a number out of range, or a lossless variant that draws other tokens at temperature 0.
        ValueError: a variant that cannot be read.
    """
    check_integer("images_per_prompt", images_per_prompt, 1)
    check_integer("batch_size", batch_size, 1)
    check_integer("timed_prompts", timed_prompts, 1)
    check_integer("runs", runs, 1)
    prompts = shapes_prompts(limit)
    checkpoint = find_checkpoint(model, model_variant)
    if checkpoint.kind != "janus":
        raise FastgenError(f"model: {model} does not draw tokens")
    if dtype == "auto":
        dtype = "bfloat16" if native_bfloat16(torch.device(device)) else "float32"
    own = {} if checkpoint.drafter is None else {"own": checkpoint.drafter}
    folders = own if drafters is None else dict(drafters)
    pipes: dict[str, Any] = {}
    targets: dict[str, Target] = {}
    known: dict[str, dict[str, Any]] = {}
    heads: dict[str, WindowHeads | None] = {}
    for kind in dict.fromkeys(("float32", dtype)):
        pipe: Any = load_checkpoint(checkpoint, device=device, dtype=kind)
        target = target_of(pipe.model, pipe.tokenizer)
        known[kind] = {
            name: (load_drafter(place, target.dtype).to(target.device), Calibration.for_drafter(place))
            for name, place in folders.items()
        }
        own_heads = None if checkpoint.drafter is None else load_heads(checkpoint.drafter, target.dtype)
        heads[kind] = None if own_heads is None else own_heads.to(target.device)
        pipes[kind], targets[kind] = pipe, target
    drafter, calibration = next(iter(known[dtype].values()), (None, None))
    default = default_source(pipes[dtype], drafter, calibration, heads[dtype], compile)
    if variants is None:
        variants = default_variants(heads[dtype], calibration is not None)
    # What "auto" takes is one of the kinds that the others are.
    fixed = [text for text in variants if text.split()[1:2] != ["auto"]]
    gated = [parse_variant(text, targets["float32"], known["float32"], heads=heads["float32"]) for text in fixed]
    target = targets[dtype]
    scale = guidance_scale or float(checkpoint.defaults.get("guidance_scale") or target.default_law.guidance_scale)
    law = TokenLaw(scale)
    chosen = [prompts[index].prompt for index in spread(len(prompts), timed_prompts)]
    report("gate")
    _gate(targets["float32"], law, chosen[:2], gated)

    def choose(rule: AcceptanceRule, drafter: Any) -> tuple[DraftSource | None, str]:
        report(f"auto {rule.name}")
        with torch.no_grad():
            prefix = target.prefix(chosen[:1], law.guided)
        return choose_source(target, drafter, rule, prefix, law, compile=compile, heads=heads[dtype])

    rows_of = [parse_variant(text, target, known[dtype], choose, heads[dtype]) for text in variants]
    scored = _scores(target, law, rows_of, prompts, folder, images_per_prompt, batch_size, checkpoint, report, quality)
    report("time")
    rows = _timed(pipes, targets, law, chosen, rows_of, dtype, runs, compile)
    unspeculated = next(row for row in rows if row["variant"] == f"plain loop, {dtype}")
    ours = [unspeculated, *rows[len(rows) - len(rows_of) :]]
    for row, scores in zip(ours, scored, strict=True):
        row |= {name: value for name, value in scores.items() if name != "prompts"}
        if scores and row is not unspeculated:
            row["paired"] = paired_difference(scored[0], scores)
    for batch in batches:
        report(f"batch {batch}")
        made = _throughputs(targets, law, rows_of, dtype, chosen, batch, compile)
        for row in rows:
            if row["variant"] in made:
                row.setdefault("pictures_a_minute", {})[str(batch)] = made[row["variant"]]
    settings = {
        "model": model,
        "model_variant": model_variant,
        "drafters": list(folders),
        "guidance_scale": scale,
        "images_per_prompt": images_per_prompt,
        "prompts": len(prompts) if quality else 0,
        "batch_size": batch_size,
        "timed_prompts": len(chosen),
        "runs": runs,
        "device": device,
        "dtype": dtype,
        "compile": compile,
        "threads": torch.get_num_threads(),
        "target": describe(target),
        "default": default,
    }
    whole = []
    if commands:
        report("commands")
        whole = _commands(["--model", model, "--device", device], model_variant, chosen[0], commands)
    return result_of("speculative", settings, rows=rows, commands=whole)


def _commands(options: list[str], variant: str | None, prompt: str, runs: int) -> list[dict[str, Any]]:
    """Seconds of whole processes that draw one picture: with the default source, and with none."""
    options += [] if variant is None else ["--variant", variant]
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "fastgen.cli.main", "generate", prompt, *options, "--overwrite"]
        words += ["-o", str(Path(folder, "out.png")), "--method", "speculative"]
        ends: list[list[str]] = [[], ["--tree", "plain"]]
        calls = {
            " ".join(["fastgen generate --method speculative", *end]): partial(measure_process, [*words, *end])
            for end in ends
        }
        turns = take_turns(calls, runs)
    return [{"what": name, "n": runs, "seconds": percentiles(taken)} for name, taken in turns.items()]


@torch.no_grad()
def _draw(
    target: Target,
    law: TokenLaw,
    variant: Variant | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    compile: bool = False,
) -> Decoded:
    """Tokens of a batch; without a variant by the plain loop."""
    prefix = target.prefix(prompts, law.guided)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    source = None if variant is None else variant.source()
    if variant is None or source is None:
        return decode_plain(target, prefix, law, generators, compile=compile)
    return decode_speculative(target, source, variant.rule, prefix, law, generators, compile=compile)


def _gate(target: Target, law: TokenLaw, prompts: Sequence[str], variants: Sequence[Variant]) -> None:
    """No speed-up from a wrong decoder: lossless variants draw the plain loop's tokens at temperature 0."""
    greedy, seeds = replace(law, temperature=0.0), list(range(len(prompts)))
    plain = _draw(target, greedy, None, prompts, seeds).tokens
    for variant in variants:
        if variant.rule.loss == "lossy":
            continue
        source = variant.source()
        if source is None:
            continue
        if isinstance(source, TreeSource):
            source = TreeSource(source.drafter, source.tree, sampled=False)
        prefix = target.prefix(prompts, law.guided)
        generators = [torch.Generator() for _ in prompts]
        tokens = decode_speculative(target, source, variant.rule, prefix, greedy, generators).tokens
        if not torch.equal(tokens, plain):
            raise FastgenError(
                f"{variant.name}: other tokens than the plain loop's at temperature 0; nothing is timed"
            )


def _scores(
    target: Target,
    law: TokenLaw,
    variants: Sequence[Variant],
    prompts: Sequence[Any],
    folder: Path,
    images_per_prompt: int,
    batch_size: int,
    checkpoint: Any,
    report: Callable[[str], None],
    quality: bool,
) -> list[dict[str, Any]]:
    """Scores of the plain loop and of every variant; empty ones without `quality`."""
    if not quality:
        return [{} for _ in range(1 + len(variants))]
    device = str(target.device)
    detector, fingerprint = load_detector(device=device), model_fingerprint(*checkpoint.folders)
    verifier = ShapesVerifier.load(device=device)
    scored = []
    for variant in (None, *variants):
        name = "plain" if variant is None else variant.name
        report(name)
        settings = RunSettings(
            name, fingerprint, images_per_prompt, device=device, batch_size=batch_size, variant=checkpoint.variant
        )
        scored.append(
            score_row(
                folder, prompts, settings, partial(_pictures, target, law, variant, batch_size), detector, verifier
            )
        )
    return scored


def _throughputs(
    targets: dict[str, Target],
    law: TokenLaw,
    variants: Sequence[Variant],
    dtype: str,
    prompts: Sequence[str],
    batch: int,
    compile: bool,
) -> dict[str, float]:
    """Pictures a minute of the faster of two batches, after a first one; plain loops and variants in turn."""
    texts = [prompts[number % len(prompts)] for number in range(batch)]
    calls = {
        name: partial(draw, texts, range(batch))
        for name, draw in _drawn(targets, law, variants, dtype, compile).items()
    }
    seconds = take_turns(calls, 2, device=targets[dtype].device)
    return {name: 60 * batch / min(taken) for name, taken in seconds.items()}


def _drawn(
    targets: dict[str, Target], law: TokenLaw, variants: Sequence[Variant], dtype: str, compile: bool
) -> dict[str, Callable[[Sequence[str], Sequence[int]], Decoded]]:
    """What draws a batch of prompts with their seeds, by row: our plain loops, and the variants."""
    calls: dict[str, Callable[[Sequence[str], Sequence[int]], Decoded]] = {}
    for kind, target in targets.items():
        calls[f"plain loop, {kind}"] = partial(_draw, target, law, None)
        if compile:
            calls[f"plain loop, {kind}, compiled"] = partial(_draw, target, law, None, compile=True)
    return calls | {each.name: partial(_draw, targets[dtype], law, each, compile=compile) for each in variants}


def _pictures(
    target: Target, law: TokenLaw, variant: Variant | None, batch_size: int, prompts: list[str], seeds: list[int]
) -> Iterator[Image.Image]:
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        tokens = _draw(target, law, variant, prompts[part], seeds[part]).tokens
        with torch.no_grad():
            pictures = as_output(target.pixels(tokens), "pil")
        yield from pictures


def _timed(
    pipes: dict[str, Any],
    targets: dict[str, Target],
    law: TokenLaw,
    prompts: Sequence[str],
    variants: Sequence[Variant],
    dtype: str,
    runs: int,
    compile: bool,
) -> list[dict[str, Any]]:
    """Seconds, passes and accepted lengths of single pictures; all in turn, after one round of warm-up."""

    def stock(pipe: Any, texts: Sequence[str], seeds: Sequence[int]) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        pipe(list(texts), guidance_scale=law.guidance_scale, generator=generators, output_type="tokens")

    calls: dict[str, Callable[[Sequence[str], Sequence[int]], Any]] = {}
    ours = _drawn(targets, law, variants, dtype, compile)
    calls |= {name: draw for name, draw in ours.items() if name.startswith("plain loop")}
    calls |= {f"stock generate, {kind}": partial(stock, pipe) for kind, pipe in pipes.items()}
    calls |= ours
    results: dict[tuple[int, str], Any] = {}

    def kept(seed: int, prompt: str, name: str) -> None:
        results[seed, name] = calls[name]([prompt], [seed])

    turns = take_turns(
        {(seed, name): partial(kept, seed, prompt, name) for seed, prompt in enumerate(prompts) for name in calls},
        runs,
        device=targets[dtype].device,
    )
    times = {name: percentiles([each for key in turns if key[1] == name for each in turns[key]]) for name in calls}
    made = {variant.name: [results[seed, variant.name] for seed in range(len(prompts))] for variant in variants}
    rows = [_row(name, times) for name in calls if name not in made]
    return rows + [_row(variant.name, times) | _decoded(variant, made[variant.name]) for variant in variants]


def _decoded(variant: Variant, decoded: list[Decoded]) -> dict[str, Any]:
    """What a variant's pictures say of it."""
    accepted = [length for one in decoded for length in one.accepted]
    mean = sum(accepted) / len(accepted) if accepted else 0.0
    passes = sum(one.target_passes for one in decoded)
    stolen = sum(float(one.counts["stolen"].sum()) for one in decoded if "stolen" in one.counts)
    return {
        "rule": variant.rule.name,
        "drafter": variant.drafter,
        "tree": variant.tree,
        "target_pass_ratio": passes / sum(one.tokens.shape[1] for one in decoded),
        "accepted_length": mean + 1,
        "accepted_without_bonus": mean,
        "stolen": stolen / len(decoded),
    }


def _row(name: str, times: dict[str, dict[str, float]]) -> dict[str, Any]:
    def fastest(start: str) -> float:
        return min(values["p50"] for other, values in times.items() if other.startswith(start))

    return {
        "variant": name,
        **dict.fromkeys(("rule", "drafter", "tree", "score", "stderr", "fd", "verifier")),
        "target_pass_ratio": 1.0,
        "seconds": times[name],
        "speedup_vs_fastest_plain": fastest("plain loop") / times[name]["p50"],
        "speedup_vs_stock": fastest("stock generate") / times[name]["p50"],
        "accepted_length": 1.0,
        "accepted_without_bonus": 0.0,
        "stolen": 0.0,
    }
