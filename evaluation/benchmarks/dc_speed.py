"""Do saved FLOPs become time? One forward pass with dynamic chunking against the dense model, random weights.

Sizes are the paper's DiTs and Z-Image's.

No checkpoint is needed: the kept ratio is forced by a token budget. All variants of a size and batch run in turn in
every round, so that a slow moment of the machine meets all of them; the ratio of medians is what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastgen.accounting import account, count_flops
from fastgen.checks import check_choice, check_integer
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.measure import percentiles, result_of, take_turns
from fastgen.models.dc_dit import PRESETS, DCDiTTransformer2DModel
from fastgen.models.upcycle import upcycle

Z_IMAGE = "z-image"
Z_IMAGE_CONFIG: dict[str, Any] = {}  # diffusers' defaults are the published model's
KEPT = 0.25  # 1 / N, the share that the ratio loss asks for
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def benchmark_dc_speed(
    sizes: Sequence[str] = ("S", "B"),
    batches: Sequence[int] = (1, 8),
    tail_drops: Sequence[float] = (0.0, 0.3, 0.6),
    *,
    image_size: int = 256,
    runs: int = 5,
    compile: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        sizes: of `DCDiTTransformer2DModel.from_preset`, or "z-image".
        batches: samples of a forward pass.
        tail_drops: rho; round((1 - rho) L / 4) tokens are kept.
        image_size: pixels; latents have an eighth of it, the dense model patches of 2.
        runs: measured rounds.
        compile: `torch.compile` the blocks of both models.
        device, dtype: where and how.
        report: called with each line of progress.

    Returns:
        a JSON-ready dict: "environment", "settings", "rows" with flops, seconds and both ratios to the dense model.

    Raises:
        FastgenError: a number out of range, or a batch that differs from its samples drawn one by one.
    """
    check_integer("runs", runs, 1)
    check_integer("batches", min(batches, default=0), 1)
    check_choice("dtype", dtype, _DTYPES)
    for size in sizes:
        check_choice("sizes", size, (*PRESETS, Z_IMAGE))
    if image_size < 16 or image_size % 16:
        raise FastgenError(f"image_size: {image_size} is not allowed, needs a multiple of 16")
    if not all(0 <= rho < 1 for rho in tail_drops):
        raise FastgenError(f"tail_drops: {list(tail_drops)} is not allowed, needs numbers in [0, 1)")
    rows = []
    for size in sizes:
        pair = _z_image(image_size) if size == Z_IMAGE else _dit(size, image_size)
        for model in (pair.dense, pair.chunked):
            model.eval().to(device, _DTYPES[dtype])
        _check(pair, size)
        if compile:
            for model in (pair.dense, pair.chunked):
                model.compile_repeated_blocks(fullgraph=True, dynamic=True)
        for batch in batches:
            report(f"{size}, batch {batch}")
            rows += _rows(size, pair, batch, tail_drops, runs)
    settings = {
        "image_size": image_size,
        "kept": KEPT,
        "runs": runs,
        "compile": compile,
        "device": device,
        "dtype": dtype,
    }
    return result_of("dc-speed", settings, rows=rows)


@dataclass(frozen=True)
class _Pair:
    """A dense model and its counterpart with dynamic chunking.

    Attributes:
        inputs: batch -> arguments of the forward pass of both, by name, where the dense model is.
        positions: of a sample's latents.
    """

    dense: Any
    chunked: Any
    inputs: Callable[[int], dict[str, Any]]
    positions: int


def _dit(size: str, image_size: int) -> _Pair:
    from diffusers import DiTTransformer2DModel

    layers, dim, heads = PRESETS[size]
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

    return _Pair(dense, DCDiTTransformer2DModel.from_preset(size, image_size), inputs, side * side)


def _z_image(image_size: int) -> _Pair:
    """Z-Image under captions of 64 tokens."""
    from diffusers import ZImageTransformer2DModel

    side = image_size // 8
    dense = ZImageTransformer2DModel(**Z_IMAGE_CONFIG)
    for name in ("x_pad_token", "cap_pad_token"):  # left uninitialised by diffusers
        torch.nn.init.zeros_(getattr(dense, name))

    def inputs(batch: int) -> dict[str, Any]:
        captions = torch.randn(64, dense.config.cap_feat_dim, generator=torch.Generator().manual_seed(1))
        images = list(_noise(dense, batch, dense.config.in_channels, side)[:, :, None].unbind(0))
        time = torch.linspace(0.1, 0.9, batch, device=dense.device, dtype=dense.dtype)
        return {"x": images, "t": time, "cap_feats": [captions.to(dense.device, dense.dtype)] * batch}

    return _Pair(dense, upcycle(dense), inputs, side * side)


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


@torch.no_grad()
def _rows(size: str, pair: _Pair, batch: int, tail_drops: Sequence[float], runs: int) -> list[dict[str, Any]]:
    arguments = pair.inputs(batch)
    variants: list[tuple[dict[str, Any], Callable[[], Any]]] = [
        ({"variant": "dense", "tail_drop": None}, partial(pair.dense, **arguments))
    ]
    for rho in tail_drops:
        budget = max(1, round(pair.positions * KEPT * (1 - rho)))
        variants.append(
            (
                {"variant": "dc", "tail_drop": rho, "token_budget": budget},
                partial(pair.chunked, **arguments, token_budget=budget),
            )
        )
    device = next(pair.dense.parameters()).device
    flops = [_flops(work) for _, work in variants]  # a warm-up as well
    seconds = take_turns({place: work for place, (_, work) in enumerate(variants)}, runs, device=device)
    base = percentiles(seconds[0])["p50"]
    rows = []
    for (labels_of, _), count, times in zip(variants, flops, seconds.values(), strict=True):
        spread = percentiles(times)
        ratios = {"flop_ratio": count / flops[0], "time_ratio": spread["p50"] / base}
        rows.append(
            {"size": size, "batch": batch, **labels_of, "flops": count, "n": runs, "seconds": spread, **ratios}
        )
    return rows


def _flops(work: Callable[[], Any]) -> int:
    with account() as stats, count_flops():
        work()
    return stats.flops
