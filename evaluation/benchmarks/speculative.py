"""Speculative decoding: accepted length, passes, seconds and quality for rules, drafts and trees.

Seconds are those of one picture at a time, measured in one run in which all variants take turns, against the fastest
of our plain loops (in float32 and in the variants' precision, compiled and not) and the fastest stock `generate`.
Before anything is timed, every lossless variant has to draw the plain loop's very tokens at temperature 0, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
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
from fastgen.drafters.heads_source import HeadsSource, window_source
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.loading import build_rule, heads_beside, load_drafter
from fastgen.drafters.names import PLAIN
from fastgen.drafters.sources import DraftSource, TreeSource
from fastgen.drafters.targets import Target, target_of
from fastgen.drafters.tree import named_tree
from fastgen.environment import native_bfloat16
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.measure import percentiles, result_of, take_turns
from fastgen.evaluation.benchmarks.quality import score_row
from fastgen.evaluation.compare import paired_errors
from fastgen.evaluation.geneval.shapes_checker import load_detector
from fastgen.evaluation.measures import OVERALL
from fastgen.evaluation.runner import RunSettings, model_fingerprint, spread
from fastgen.evaluation.shapesworld import shapes_prompts
from fastgen.evaluation.verifiers.shapes_verifier import ShapesVerifier
from fastgen.pipelines.loading import load_checkpoint
from fastgen.pipelines.loading.checkpoint import find_checkpoint
from fastgen.pipelines.token_images import as_output

__all__ = ["VARIANTS", "Variant", "benchmark_speculative", "parse_variant"]

#: "RULE DRAFT", the draft a window, a tree ("TREE@DRAFTER" with several drafters) or "auto"; settings behind it.
VARIANTS = (
    "exact jacobi-6",
    "exact jacobi-12",
    "exact jacobi-24",
    "block jacobi-12",
    "lantern jacobi-12 delta=0.05",
    "lantern jacobi-12 delta=0.2",
    "lantern++ jacobi-12 factor=2",
    "gsd jacobi-12",
    "cool-sd jacobi-12 delta=1.1",
)


_NONE, _HEADS = "none (Jacobi)", "heads"


@dataclass(frozen=True)
class Variant:
    """One row: an acceptance rule with what it accepts from.

    Attributes:
        name: as it was written.
        rule: the rule.
        source: makes the draft source of a batch; None is the plain loop.
        drafter, tree: for the table.
    """

    name: str
    rule: AcceptanceRule
    source: Callable[[], DraftSource | None]
    drafter: str
    tree: str


Choose = Callable[[AcceptanceRule, Any], tuple[DraftSource | None, str]]


def parse_variant(
    text: str,
    target: Target,
    drafters: Mapping[str, Any] | None = None,
    choose: Choose | None = None,
    heads: WindowHeads | None = None,
) -> Variant:
    """ "RULE DRAFT [SETTING=VALUE …]", e.g. "lantern jacobi-12 delta=0.2", "exact 4-2-1" or "exact chain-4@medusa".

    Args:
        text: to be read. "quality" is a setting of "cascade", by the calibration of the drafter.
        target: the model.
        drafters: by name, each with its calibration or None; a tree takes the first where none is named.
        choose: what "auto" drafts with, for a rule and a drafter.
        heads: of windows such as "heads-12".

    Raises:
        ValueError: it cannot be read, or needs a drafter that is not there.
    """
    words = text.split()
    if len(words) < 2 or any("=" not in word for word in words[2:]):
        raise ValueError(f'variant: {text!r} is not of the form "RULE DRAFT [SETTING=VALUE …]"')
    settings: dict[str, Any] = {}
    for word in words[2:]:
        key, _, value = word.partition("=")
        try:
            settings[key] = int(value) if value.lstrip("-").isdecimal() else float(value)
        except ValueError:
            raise ValueError(f"variant: {word!r} in {text!r} is no number") from None
    tree, _, name = words[1].partition("@")
    given = drafters or {}
    name = name or next(iter(given), "")
    drafter, calibration = given.get(name, (None, None))
    if "quality" in settings:
        if words[0] != "cascade" or calibration is None:
            raise ValueError(f"variant: {text!r}: quality needs acceptance cascade and a calibrated drafter")
        settings = {**asdict(calibration.config(settings.pop("quality"))), **settings}
    rule = build_rule(words[0], target, **settings)
    if tree == PLAIN:
        return Variant(text, rule, lambda: None, _NONE, PLAIN)
    if tree == "auto" and choose is not None:
        source, found = choose(rule, drafter)
        drafts = name if isinstance(source, TreeSource) else _HEADS if isinstance(source, HeadsSource) else _NONE
        return Variant(text, rule, partial(copy, source), drafts, found)
    if tree.startswith(("jacobi-", "heads-")):
        window_source(tree, rule, heads)  # a name that cannot be read is refused here
        drafts = _HEADS if tree.startswith("heads-") else _NONE
        return Variant(text, rule, partial(window_source, tree, rule, heads), drafts, tree)
    if drafter is None:
        raise ValueError(f"variant: {text!r} needs a drafter, there is {', '.join(given) or 'none'}")
    return Variant(text, rule, partial(TreeSource, drafter, named_tree(tree), True), name, tree)


def benchmark_speculative(
    model: str,
    folder: Path,
    *,
    model_variant: str | None = None,
    drafters: Mapping[str, Path] | None = None,
    variants: Sequence[str] = VARIANTS,
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
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        model: one that draws tokens.
        folder: of the pictures; a killed run continues there.
        model_variant: of the weight files, as in diffusers.
        drafters: folders of drafters by name, for variants with trees; None takes the model's own.
        variants: see `parse_variant`.
        quality: draw the evaluation set with every variant and score it (the model has to be one of ShapesWorld).
        images_per_prompt, limit: of the evaluation set, see `fastgen eval shapes`.
        batch_size: pictures of the evaluation set at once.
        timed_prompts: pictures of a timed round, drawn one by one.
        runs: timed rounds, after one of warm-up.
        guidance_scale: None takes the model's.
        device: where.
        dtype: of the variants; "auto" is bfloat16 where the device multiplies it natively. The plain loops and stock
            `generate` run in float32 as well.
        compile: compile the rounds; the plain loop runs both ways.
        batches: also measure pictures a minute at these batch sizes, in turn; images that are done leave.
        report: called with each line of progress.

    Returns:
        a JSON-ready dict: "environment", "settings" and "rows" with variant, rule, drafter, tree, target_pass_ratio,
        seconds a picture, speedup_vs_fastest_plain, speedup_vs_stock, accepted_length (the bonus counted) and
        accepted_without_bonus, stolen (mass a picture), score, stderr, fd, verifier (mean score by
        shapes-verifier), "paired" (difference of the score to the plain loop's with its 95 % interval, by prompts as
        pairs) and "pictures_a_minute" by batch size. The first rows are the plain loops and
        stock `generate`.

    Raises:
        FastgenError: a number out of range, or a lossless variant that draws other tokens at temperature 0.
        ValueError: a variant that cannot be read.
    """
    for name, number in (("images_per_prompt", images_per_prompt), ("runs", runs), ("timed_prompts", timed_prompts)):
        check_integer(name, number, 1)
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
            name: (load_drafter(place, target.dtype).to(target.device), Calibration.beside(place))
            for name, place in folders.items()
        }
        own_heads = None if checkpoint.drafter is None else heads_beside(checkpoint.drafter, target.dtype)
        heads[kind] = None if own_heads is None else own_heads.to(target.device)
        pipes[kind], targets[kind] = pipe, target
    # What "auto" takes is one of the kinds that the others are.
    fixed = [text for text in variants if text.split()[1:2] != ["auto"]]
    gated = [parse_variant(text, targets["float32"], known["float32"], heads=heads["float32"]) for text in fixed]
    target = targets[dtype]
    scale = guidance_scale or float(checkpoint.defaults.get("guidance_scale") or target.default_law.guidance_scale)
    law = TokenLaw(scale)
    prompts = shapes_prompts(limit)
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
            row["paired"] = _paired(scored[0], scores)
    plain = [row["variant"] for row in rows if row["variant"].startswith(f"plain loop, {dtype}")]
    drawn: dict[str, Variant | None] = dict.fromkeys(plain)
    drawn |= {variant.name: variant for variant in rows_of}
    for batch in batches:
        report(f"batch {batch}")
        made = _throughputs(target, law, drawn, chosen, batch, compile)
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
    }
    return result_of("speculative", settings, rows=rows)


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


def _paired(plain: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The difference of the scores, and 95 % of it."""
    difference = row["score"] - plain["score"]
    reach = 1.96 * paired_errors(dict(plain), dict(row)).get(OVERALL, float("nan"))
    return {"difference": difference, "ci": [difference - reach, difference + reach]}


def _throughputs(
    target: Target,
    law: TokenLaw,
    variants: Mapping[str, Variant | None],
    prompts: Sequence[str],
    batch: int,
    compile: bool,
) -> dict[str, float]:
    """Pictures a minute of the faster of two batches, after a first one; all variants in turn. A variant whose name
    says "compiled" is, and all of those that draft are where `compile` says so."""
    texts = [prompts[number % len(prompts)] for number in range(batch)]

    def draw(name: str, variant: Variant | None) -> None:
        compiled = name.endswith("compiled") if variant is None else compile
        _draw(target, law, variant, texts, range(batch), compiled)

    calls = {name: partial(draw, name, variant) for name, variant in variants.items()}
    seconds = take_turns(calls, 2, device=target.device)
    return {name: 60 * batch / min(taken) for name, taken in seconds.items()}


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

    def stock(pipe: Any, prompt: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        pipe(prompt, guidance_scale=law.guidance_scale, generator=generator, output_type="tokens")

    def ours(kind: str, variant: Variant | None, compiled: bool, prompt: str, seed: int) -> Decoded:
        return _draw(targets[kind], law, variant, [prompt], [seed], compiled)

    calls: dict[str, Callable[[str, int], Any]] = {}
    for kind in pipes:
        calls[f"plain loop, {kind}"] = partial(ours, kind, None, False)
        if compile:
            calls[f"plain loop, {kind}, compiled"] = partial(ours, kind, None, True)
    calls |= {f"stock generate, {kind}": partial(stock, pipe) for kind, pipe in pipes.items()}
    calls |= {variant.name: partial(ours, dtype, variant, compile) for variant in variants}
    results: dict[tuple[int, str], Any] = {}

    def kept(seed: int, prompt: str, name: str) -> None:
        results[seed, name] = calls[name](prompt, seed)

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
        "rule": None,
        "drafter": None,
        "tree": None,
        "target_pass_ratio": 1.0,
        "seconds": times[name],
        "speedup_vs_fastest_plain": fastest("plain loop") / times[name]["p50"],
        "speedup_vs_stock": fastest("stock generate") / times[name]["p50"],
        "accepted_length": 1.0,
        "accepted_without_bonus": 0.0,
        "stolen": 0.0,
        "score": None,
        "stderr": None,
        "fd": None,
        "verifier": None,
    }
