"""Do saved FLOPs become time? One forward pass of DC-DiT at the paper's sizes against the dense DiT, random weights.

No checkpoint is needed: the kept ratio is forced by a token budget. All variants of a size and batch run in turn in
every round, so that a slow moment of the machine meets all of them; the ratio of medians is what counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fastgen.accounting import account, count_flops
from fastgen.environment import environment
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.measure import percentiles
from fastgen.models.dc_dit import PRESETS, DCDiTTransformer2DModel

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
        sizes: of `DCDiTTransformer2DModel.from_preset`.
        batches: samples of a forward pass.
        tail_drops: rho; round((1 - rho) L / 4) tokens are kept.
        image_size: pixels; latents have an eighth of it, the dense model patches of 2.
        runs: measured rounds.
        compile: `torch.compile` the blocks of both models.
        device, dtype: where and how.
        report: told what is going on.

    Returns:
        a JSON-ready dict: "environment", "settings", "rows" with flops, seconds and both ratios to the dense model.

    Raises:
        FastgenError: a number out of range, or a batch that does not equal its samples alone.
    """
    for name, values in (("batches", batches), ("runs", (runs,))):
        if not values or min(values) < 1:
            raise FastgenError(f"{name}: {list(values)} is not allowed, needs integers >= 1")
    if unknown := [size for size in sizes if size not in PRESETS]:
        raise FastgenError(f"sizes: {unknown[0]!r} is unknown, choose of {', '.join(PRESETS)}")
    if not all(0 <= rho < 1 for rho in tail_drops):
        raise FastgenError(f"tail_drops: {list(tail_drops)} is not allowed, needs numbers in [0, 1)")
    rows = []
    for size in sizes:
        dense, chunked = _models(size, image_size, device, _DTYPES[dtype])
        _check(chunked, size)
        if compile:
            for model in (dense, chunked):
                model.compile_repeated_blocks(fullgraph=True, dynamic=True)
        for batch in batches:
            report(f"{size}, batch {batch}")
            rows += _rows(size, dense, chunked, batch, tail_drops, runs)
    return {
        "benchmark": "dc-speed",
        "environment": environment(),
        "settings": {
            "image_size": image_size,
            "kept": KEPT,
            "runs": runs,
            "compile": compile,
            "device": device,
            "dtype": dtype,
        },
        "rows": rows,
    }


def _models(size: str, image_size: int, device: str, dtype: torch.dtype) -> tuple[Any, DCDiTTransformer2DModel]:
    from diffusers import DiTTransformer2DModel

    layers, dim, heads = PRESETS[size]
    dense = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=dim // heads,
        num_layers=layers,
        in_channels=4,
        out_channels=8,
        sample_size=image_size // 8,
    )
    # diffusers gives every block its own copy of one embedding, and computes it as often; a DiT has one.
    for block in dense.transformer_blocks[1:]:
        block.norm1.emb = dense.transformer_blocks[0].norm1.emb
    chunked = DCDiTTransformer2DModel.from_preset(size, image_size)
    return dense.eval().to(device, dtype), chunked.eval().to(device, dtype)


def _inputs(model: Any, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    side = model.config.sample_size
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, side, side, generator=generator).to(model.device, model.dtype)
    index = torch.arange(batch, device=model.device)
    return latents, index * 7 % 1000, index % 1000


@torch.no_grad()
def _check(model: DCDiTTransformer2DModel, size: str) -> None:
    """No time is worth taking of a wrong result: a batch of unequal lengths equals its samples alone."""
    latents, timestep, labels = _inputs(model, 2)
    both = model(latents, timestep, labels, tail_drop=[0.0, 0.5]).sample
    for i, rho in enumerate((0.0, 0.5)):
        alone = model(latents[i : i + 1], timestep[i : i + 1], labels[i : i + 1], tail_drop=rho).sample
        error = (both[i] - alone[0]).abs().max()
        if error > 0.01 * alone.abs().max() + 1e-6:
            raise FastgenError(f"DC-DiT-{size}: a batch differs from its samples alone by {float(error):.2g}")


@torch.no_grad()
def _rows(
    size: str, dense: Any, chunked: Any, batch: int, tail_drops: Sequence[float], runs: int
) -> list[dict[str, Any]]:
    latents, timestep, labels = _inputs(chunked, batch)
    positions = latents.shape[2] * latents.shape[3]
    variants: list[tuple[dict[str, Any], Callable[[], Any]]] = [
        ({"variant": "dense", "tail_drop": None}, partial(dense, latents, timestep=timestep, class_labels=labels))
    ]
    for rho in tail_drops:
        budget = max(1, round(positions * KEPT * (1 - rho)))
        variants.append(
            (
                {"variant": "dc", "tail_drop": rho, "token_budget": budget},
                partial(chunked, latents, timestep, labels, token_budget=budget),
            )
        )
    flops = [_flops(work) for _, work in variants]  # a warm-up as well
    seconds: list[list[float]] = [[] for _ in variants]
    for turn in range(runs + 1):
        for place, (_, work) in enumerate(variants):
            taken = _seconds(work, latents.device)
            if turn > 0:
                seconds[place].append(taken)
    base = percentiles(seconds[0])["p50"]
    rows = []
    for (labels_of, _), count, times in zip(variants, flops, seconds, strict=True):
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


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
