"""Do saved FLOPs become time? One forward pass with dynamic chunking against the dense model, random weights.

Sizes are the paper's DiTs and Z-Image's. No checkpoint is needed: the kept share is forced by a token budget. All
variants of a size and batch run in turn in every round, so that a slow moment of the machine meets all of them; the
ratio of medians is what counts.

Where whole models would take hours, as on a CPU, models of a block or two run and are extrapolated to their depth (see
`fastgen.evaluation.benchmarks.dc_blocks`); the result says so.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastgen.accounting import wait_for
from fastgen.checks import check_choice, check_integer, check_number
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.dc_blocks import Parts, flops_of, parts_of
from fastgen.evaluation.benchmarks.measure import percentiles, result_of, seconds_of
from fastgen.kernels.dispatch import has_triton
from fastgen.models.dc_dit import PRESETS, DCDiTTransformer2DModel
from fastgen.models.upcycle import upcycle
from fastgen.pipelines.kernels import enable_kernels

Z_IMAGE = "z-image"
Z_IMAGE_CONFIG: dict[str, Any] = {}  # diffusers' defaults are the published model's
SIZES = ("XL@512", "z-image@1024", "z-image@2048")
SHARES = (0.5, 0.25)
ASKED = 0.9
"""Least share of the saved FLOPs that should become saved time, from `ASKED_TOKENS` tokens on."""
ASKED_TOKENS = 1024
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CAPTION = 64


def benchmark_dc_speed(
    sizes: Sequence[str] = SIZES,
    batches: Sequence[int] = (1,),
    shares: Sequence[float] = SHARES,
    *,
    runs: int = 5,
    seconds: float = 150.0,
    compile: bool = True,
    whole: bool | None = None,
    device: str = "cpu",
    dtype: str = "bfloat16",
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        sizes: MODEL@PIXELS each, a model of `DCDiTTransformer2DModel.from_preset` or "z-image".
        batches: samples of a forward pass.
        shares: tokens that are kept, of as many as the dense model has.
        runs: most measured rounds.
        seconds: after which a size and batch begins no further round, and compiles nothing whose round is longer.
        compile: also with the blocks of both models compiled.
        whole: measure whole models; False a block of each kind, None whole ones on a GPU.
        device, dtype: where and how.
        report: called with each line of progress.

    Returns:
        a JSON-ready dict: "environment", "settings", "rows" with flops, seconds and ratios to the dense model, or with
        "missing", the reason why a variant was not measured.

    Raises:
        FastgenError: a number out of range, or a batch that differs from its samples drawn one by one.
    """
    check_integer("runs", runs, 1)
    check_number("seconds", seconds, 0)
    check_integer("batches", min(batches, default=0), 1)
    check_choice("dtype", dtype, _DTYPES)
    if not shares or not all(0 < share <= 1 for share in shares):
        raise FastgenError(f"shares: {list(shares)} is not allowed, needs numbers in (0, 1]")
    asked = [_parsed(size) for size in sizes]
    whole = not device.startswith("cpu") if whole is None else whole
    rows = []
    for model, pixels in asked:
        pair = _z_image(pixels, whole) if model == Z_IMAGE else _dit(model, pixels, whole)
        for each in (pair.dense, pair.chunked):
            each.eval().to(device, _DTYPES[dtype])
        if whole or pair.tokens <= ASKED_TOKENS:
            _check(pair, model)
        for batch in batches:
            report(f"{model}, {pixels} pixels, batch {batch}")
            variants = _variants(pair, batch, shares)
            measured = _measured(pair, variants, compile, runs, seconds, whole)
            size: dict[str, Any] = {"size": model, "pixels": pixels, "batch": batch, "dense_tokens": pair.tokens}
            rows += [{**size, **row} for row in measured]
    settings: dict[str, Any] = {"runs": runs, "seconds": seconds, "compile": compile, "extrapolated": not whole}
    settings |= {"device": device, "dtype": dtype, "asked": ASKED, "asked_tokens": ASKED_TOKENS}
    return result_of("dc-speed", settings, rows=rows)


def _parsed(size: str) -> tuple[str, int]:
    """Model and pixels of MODEL@PIXELS.

    Raises:
        FastgenError: it is none.
    """
    model, at, pixels = size.partition("@")
    check_choice("sizes", model, (*PRESETS, Z_IMAGE))
    if not at or not pixels.isdecimal() or not int(pixels) or int(pixels) % 16:
        raise FastgenError(f"sizes: {size!r} is not allowed, needs MODEL@PIXELS with a multiple of 16 pixels")
    return model, int(pixels)


@dataclass(frozen=True)
class _Pair:
    """A dense model and its counterpart with dynamic chunking.

    Attributes:
        inputs: batch -> arguments of the forward pass of both, by name, where the dense model is.
        tokens: of a sample's picture in the dense model.
        dense_counts, chunked_counts: kind -> blocks of the deep model.
    """

    dense: Any
    chunked: Any
    inputs: Callable[[int], dict[str, Any]]
    tokens: int
    dense_counts: dict[str, int]
    chunked_counts: dict[str, int]


def _dit(size: str, image_size: int, whole: bool) -> _Pair:
    from diffusers import DiTTransformer2DModel

    depth, dim, heads = PRESETS[size]
    layers = depth if whole else 1
    side = image_size // 8
    dense = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=dim // heads,
        num_layers=layers,
        in_channels=4,
        out_channels=8,
        sample_size=side,
    )
    # diffusers gives every block its own copy of one embedding, and computes it as often; a DiT has one.
    for block in dense.transformer_blocks[1:]:
        block.norm1.emb = dense.transformer_blocks[0].norm1.emb

    def inputs(batch: int) -> dict[str, Any]:
        index = torch.arange(batch, device=dense.device)
        latents = _noise(dense, batch, 4, side)
        return {"hidden_states": latents, "timestep": index * 7 % 1000, "class_labels": index % 1000}

    chunked = DCDiTTransformer2DModel.from_preset(size, image_size, num_layers=layers)
    counts = {"transformer_blocks": depth}
    return _Pair(dense, chunked, inputs, side * side // 4, counts, counts)


def _z_image(image_size: int, whole: bool) -> _Pair:
    """Z-Image under captions of 64 tokens, and with chunking on its own patches."""
    from diffusers import ZImageTransformer2DModel

    side = image_size // 8
    shallow = {} if whole else {"n_layers": 2, "n_refiner_layers": 1}
    dense = ZImageTransformer2DModel(**{**Z_IMAGE_CONFIG, **shallow})
    for name in ("x_pad_token", "cap_pad_token"):  # left uninitialised by diffusers
        torch.nn.init.zeros_(getattr(dense, name))

    def inputs(batch: int) -> dict[str, Any]:
        captions = torch.randn(_CAPTION, dense.config.cap_feat_dim, generator=torch.Generator().manual_seed(1))
        images = list(_noise(dense, batch, dense.config.in_channels, side)[:, :, None].unbind(0))
        time = torch.linspace(0.1, 0.9, batch, device=dense.device, dtype=dense.dtype)
        return {"x": images, "t": time, "cap_feats": [captions.to(dense.device, dense.dtype)] * batch}

    full = inspect.signature(ZImageTransformer2DModel).bind(**Z_IMAGE_CONFIG)
    full.apply_defaults()
    refiners = dict.fromkeys(("noise_refiner", "context_refiner"), full.arguments["n_refiner_layers"])
    counts = {**refiners, "layers": full.arguments["n_layers"]}
    ours = {**counts, "layers": counts["layers"] - 1, "last_layers": 1}
    return _Pair(dense, upcycle(dense, grid="patch"), inputs, side * side // 4, counts, ours)


def _noise(model: Any, batch: int, channels: int, side: int) -> torch.Tensor:
    noise = torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))
    return noise.to(model.device, model.dtype)


@torch.no_grad()
def _check(pair: _Pair, size: str) -> None:
    """No time is worth taking of a wrong result: a batch of unequal lengths equals its samples alone."""
    arguments = pair.inputs(2)
    both = pair.chunked(**arguments, tail_drop=[0.0, 0.5]).sample
    for i, rho in enumerate((0.0, 0.5)):
        alone = pair.chunked(**{name: value[i : i + 1] for name, value in arguments.items()}, tail_drop=rho).sample
        error = (both[i] - alone[0]).abs().max()
        if error > 0.01 * alone[0].abs().max() + 1e-6:
            raise FastgenError(f"{size}: a batch differs from its samples computed one by one by {float(error):.2g}")


@dataclass(frozen=True)
class _Variant:
    """One row: what it is called, its forward pass, and why it is not measured."""

    labels: dict[str, Any]
    model: Any
    call: Callable[[], Any]
    counts: dict[str, int]
    compiled: bool = False
    missing: str | None = None


def _variants(pair: _Pair, batch: int, shares: Sequence[float]) -> list[_Variant]:
    """Every model eager; what is compiled comes from these."""
    arguments = pair.inputs(batch)
    dense: dict[str, Any] = {"variant": "dense", "share": None}
    found = [_Variant(dense, pair.dense, partial(pair.dense, **arguments), pair.dense_counts)]
    why = None if has_triton() and pair.dense.device.type == "cuda" else "Triton needs a GPU"
    fused = pair.dense
    if why is None:
        fused = copy.deepcopy(pair.dense)
        if not any(enable_kernels(fused).values()):
            why = f"no kernel fits {type(fused).__name__}"
    labels = {**dense, "variant": "dense, our kernels"}
    found.append(_Variant(labels, fused, partial(fused, **arguments), pair.dense_counts, missing=why))
    for share in shares:
        budget = max(1, round(pair.tokens * share))
        labels = {"variant": "chunked", "share": share, "token_budget": budget}
        call = partial(pair.chunked, **arguments, token_budget=budget)
        found.append(_Variant(labels, pair.chunked, call, pair.chunked_counts))
    return found


def _compiled(variants: Sequence[_Variant], missing: str | None) -> list[_Variant]:
    """The eager variants compiled, or why they are not; models are copied, as compiling changes them."""
    found = []
    for each in variants:
        if each.missing is None and "kernels" not in each.labels["variant"]:
            labels = {**each.labels, "variant": f"{each.labels['variant']}, compiled"}
            found.append(_Variant(labels, each.model, each.call, each.counts, True, missing))
    return found


@torch.no_grad()
def _measured(
    pair: _Pair, variants: list[_Variant], compile: bool, runs: int, limit: float, whole: bool
) -> list[dict[str, Any]]:
    """Rows of all variants, measured in turn."""
    device = next(pair.dense.parameters()).device
    parts = [None if each.missing else _parts(each, whole) for each in variants]
    first = _round(parts, device)  # warm-up
    if compile:
        taken = sum(sum(each.values()) for each in first if each is not None)
        why = None if taken <= limit / 4 else f"a round takes {taken:.0f} s here; left out above {limit / 4:.0f} s"
        more = _compiled(variants, why)
        variants = variants + more
        parts += [None if each.missing else _parts(each, whole) for each in more]
        if why is None:
            _round(parts, device)  # compiles
    rounds: list[list[dict[str, float] | None]] = []
    began, spent = time.monotonic(), 0.0
    while not rounds or (len(rounds) < runs and time.monotonic() - began + spent <= limit):
        rounds.append(_round(parts, device))
        spent = (time.monotonic() - began) / len(rounds)
    return _rows(variants, parts, rounds)


def _parts(variant: _Variant, whole: bool) -> Parts:
    """What is measured of a variant."""
    if not whole:
        return parts_of(variant.model, variant.call, variant.counts, variant.compiled)
    call = variant.call
    if variant.compiled:
        model = copy.deepcopy(variant.model)
        model.compile_repeated_blocks(fullgraph=True, dynamic=True)
        call = partial(model, **variant.call.keywords)  # type: ignore[attr-defined]
    found = Parts({}, {"": call}, {"": flops_of(variant.call)})
    wait_for(next(variant.model.parameters()).device)
    return found


def _round(parts: Sequence[Parts | None], device: torch.device) -> list[dict[str, float] | None]:
    """Seconds of all parts of all variants, one after the other."""
    return [
        None if each is None else {kind: seconds_of(call, device) for kind, call in each.calls.items()}
        for each in parts
    ]


def _rows(
    variants: Sequence[_Variant], parts: Sequence[Parts | None], rounds: Sequence[Sequence[dict[str, float] | None]]
) -> list[dict[str, Any]]:
    """One row for each variant; the first one is the dense model that all are compared with."""
    rows: list[dict[str, Any]] = []
    for index, (variant, part) in enumerate(zip(variants, parts, strict=True)):
        if part is None:
            rows.append({**variant.labels, "missing": variant.missing})
            continue
        times = []
        for taken in rounds:
            own, dense, base = taken[index], taken[0], parts[0]
            if own is not None and dense is not None and base is not None:
                rate = dense["layers"] / base.flops["layers"] if "layers" in dense else 0.0
                times.append(part.total_seconds(own, rate))
        spread, flops = percentiles(times), part.total_flops()
        base_flops, base_time = (rows[0]["flops"], rows[0]["seconds"]["p50"]) if rows else (flops, spread["p50"])
        ratios = {"flop_ratio": flops / base_flops, "time_ratio": spread["p50"] / base_time}
        gained = {"efficiency": ratios["flop_ratio"] / ratios["time_ratio"]}
        rows.append({**variant.labels, "flops": flops, "n": len(times), "seconds": spread, **ratios, **gained})
    return rows
