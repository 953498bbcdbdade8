"""One step of models of real size with random weights, kernels on and off, compiled and not, taking turns.

DiT, DC-DiT, Z-Image and FLUX: a forward pass of the transformer, the larger two with a part of their layers. VAE and
VQ: the decoding of pictures. What a round of speculative decoding costs is measured by `fastgen bench
speculative-cost`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.kernel_timing import Timing, walls
from fastgen.evaluation.benchmarks.measure import seconds_of, take_turns
from fastgen.kernels.dispatch import use_kernels
from fastgen.pipelines.kernels import enable_kernels

__all__ = ["MODELS", "benchmark_end_to_end"]

_DTYPE = torch.bfloat16
_WARM_UP = 5
_NODES = 26
_ROUND = f"Janus-Pro-1B, round over {_NODES} nodes, 1 image with guidance"


@dataclass(frozen=True, slots=True)
class _Step:
    """A model and one step of it.

    Attributes:
        model: what kernels are enabled in, or None where the model calls them itself.
        run: a step.
        compile: compiles what repeats in it.
    """

    model: nn.Module | None
    run: Callable[[], object]
    compile: Callable[[], object]


def _fresh(build: Callable[[], nn.Module], device: torch.device) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(_DTYPE)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return build().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def _randomized(model: nn.Module) -> nn.Module:
    """Replaces zeros, which untrained models have many of: a router of zeros keeps no tokens."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return model


def _noise(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device, dtype=_DTYPE)


def _dc_dit_xl(device: torch.device, budget: int | None) -> _Step:
    from fastgen.models.dc_dit import DCDiTTransformer2DModel

    model = _fresh(lambda: _randomized(DCDiTTransformer2DModel.from_preset("XL", image_size=256)), device)
    latents = _noise(device, 32, 4, 32, 32)
    steps, labels = torch.full((32,), 500, device=device), torch.arange(32, device=device)
    return _Step(
        None,
        lambda: model(latents, steps, labels, token_budget=budget),
        lambda: model.compile_repeated_blocks(dynamic=True),
    )


def _dit_xl(device: torch.device) -> _Step:
    from diffusers import DiTTransformer2DModel

    model = _fresh(
        lambda: _randomized(
            DiTTransformer2DModel(
                num_attention_heads=16,
                attention_head_dim=72,
                in_channels=4,
                out_channels=8,
                num_layers=28,
                sample_size=32,
                num_embeds_ada_norm=1000,
                norm_type="ada_norm_zero",
            )
        ),
        device,
    )
    latents = _noise(device, 32, 4, 32, 32)
    steps, labels = torch.full((32,), 500, device=device), torch.arange(32, device=device)
    return _Step(
        model,
        lambda: model(latents, steps, class_labels=labels),
        lambda: [block.compile() for block in model.transformer_blocks],
    )


def _z_image(device: torch.device, side: int) -> _Step:
    from diffusers import ZImageTransformer2DModel

    # As many layers as fit a short run: a third of Z-Image's, at its width.
    model = _fresh(lambda: _randomized(ZImageTransformer2DModel(n_layers=10)), device)
    latents = [_noise(device, 16, 1, side // 8, side // 8) for _ in range(2)]
    captions = [_noise(device, 64, 2560) for _ in range(2)]
    steps = torch.full((2,), 0.5, device=device, dtype=_DTYPE)
    return _Step(
        model,
        lambda: model(latents, steps, captions, return_dict=False),
        lambda: [block.compile() for block in (*model.noise_refiner, *model.context_refiner, *model.layers)],
    )


def _flux(device: torch.device) -> _Step:
    from diffusers import FluxTransformer2DModel

    model = _fresh(lambda: _randomized(FluxTransformer2DModel(num_layers=5, num_single_layers=10)), device)
    image_ids = torch.zeros(4096, 3, device=device)
    image_ids[:, 1], image_ids[:, 2] = torch.arange(4096, device=device) // 64, torch.arange(4096, device=device) % 64
    inputs = {
        "hidden_states": _noise(device, 1, 4096, 64),
        "encoder_hidden_states": _noise(device, 1, 512, 4096),
        "pooled_projections": _noise(device, 1, 768),
        "timestep": torch.full((1,), 0.5, device=device, dtype=_DTYPE),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(512, 3, device=device),
        "return_dict": False,
    }
    return _Step(
        model,
        lambda: model(**inputs),
        lambda: [block.compile() for block in (*model.transformer_blocks, *model.single_transformer_blocks)],
    )


def _vae(device: torch.device, side: int) -> _Step:
    from diffusers import AutoencoderKL

    model = _fresh(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
        ),
        device,
    )
    latents = _noise(device, 1, 16, side // 8, side // 8)
    return _Step(model, lambda: model.decode(latents, return_dict=False), lambda: model.decoder.compile())


def _janus_decoder(device: torch.device) -> _Step:
    from transformers import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    model = _fresh(lambda: JanusVQVAE(JanusVQVAEConfig(num_patches=24)), device)
    codes = torch.arange(4 * 576, device=device).view(4, 576) % 16384
    return _Step(model.decoder, lambda: model.decode(codes), lambda: model.decoder.compile())


_STEPS: dict[str, Callable[[torch.device], _Step]] = {
    "DC-DiT-XL 256², 32 images, 256 tokens": lambda device: _dc_dit_xl(device, 256),
    "Z-Image width, 10 of 30 layers, 1024², 2 images": lambda device: _z_image(device, 1024),
    "VAE decode 1024²": lambda device: _vae(device, 1024),
    "DiT-XL/2 256², 32 images": _dit_xl,
    "FLUX width, 5 + 10 of 19 + 38 layers, 1024²": _flux,
    "Janus-Pro VQ decode 384², 4 images": _janus_decoder,
    "DC-DiT-XL 256², 32 images, threshold": lambda device: _dc_dit_xl(device, None),
}
"""Name -> builder of the model and its step."""
MODELS = (_ROUND, *_STEPS)


@torch.no_grad()
def benchmark_end_to_end(
    device: torch.device,
    names: Sequence[str] | None = None,
    *,
    repetitions: int = 20,
    seconds: float = 110.0,
    report: Callable[[str], None] = lambda line: None,
    add: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Time a step of each model in four ways: eager and compiled, kernels off and on.

    Args:
        device: a CUDA device.
        names: of `MODELS`; None takes all.
        repetitions: measured steps of each way, after five.
        seconds: after this time no other model is begun.
        report: called with each line of progress.
        add: given every row when it is measured.

    Returns:
        rows with model, times of "eager", "eager_kernels", "compiled" and "compiled_kernels", the speed-ups of kernels
        for either ("speedup_eager", "speedup_compiled"), seconds of the first compiled step, and the RMS of the
        difference that kernels make, relative to the result.

    Raises:
        FastgenError: no CUDA device.
    """
    if device.type != "cuda":
        raise FastgenError(f"--end-to-end: needs a CUDA device, got {device}")
    started, rows = time.perf_counter(), []
    for name in names or MODELS:
        if time.perf_counter() - started > seconds:
            rows.append({"model": name, "note": "not begun: the time was up"})
        else:
            report(name)
            rows.append(_janus_round(device, repetitions) if name == _ROUND else _measure(name, device, repetitions))
            torch._dynamo.reset()
            torch.cuda.empty_cache()
        add(rows[-1])
    return rows


def _janus_round(device: torch.device, repetitions: int) -> dict[str, Any]:
    """A round of speculative decoding without a drafter: a pass over a chain, probabilities, verification, commit."""
    from fastgen.evaluation.benchmarks.speculative_cost import build_target, measure_target

    target = build_target("janus-pro-1b", device, _DTYPE)
    row: dict[str, Any] = {"model": _ROUND, "compiled": None, "compiled_kernels": None, "rms": None}
    for mode, way in (("reference", "eager"), ("auto", "eager_kernels")):
        with use_kernels(mode):
            costs = measure_target(target, (1, _NODES), repetitions)[0][-1]
        row[way] = {name: costs["verify"][name] + costs["left"][name] for name in ("p20", "p50", "p80")}
        row[f"{way}_left"] = costs["left"]
    row["speedup_eager"] = row["eager"]["p50"] / row["eager_kernels"]["p50"]
    return row | {"speedup_compiled": None}


def _measure(name: str, device: torch.device, repetitions: int) -> dict[str, Any]:
    row: dict[str, Any] = {"model": name}
    steps = {"reference": _STEPS[name](device), "auto": _STEPS[name](device)}  # equal weights
    if steps["auto"].model is not None:
        row["installed"] = enable_kernels(steps["auto"].model)
    row["rms"] = _difference(steps)
    eager = _time(steps, repetitions)
    row |= {"eager": eager["reference"], "eager_kernels": eager["auto"]}
    # A graph keeps the choice of kernels that it was traced with, and equal code shares graphs: one after the other.
    for mode, step in steps.items():
        way = "compiled" if mode == "reference" else "compiled_kernels"
        torch._dynamo.reset()
        step.compile()
        with use_kernels(mode):
            row[f"{way}_cold_seconds"] = seconds_of(step.run, device)
        row[way] = _time({mode: step}, repetitions)[mode]
    for kind in ("eager", "compiled"):
        row[f"speedup_{kind}"] = row[kind]["p50"] / row[f"{kind}_kernels"]["p50"]
    return row


def _difference(steps: dict[str, _Step]) -> float:
    results = []
    for mode, step in steps.items():
        with use_kernels(mode):
            result: Any = step.run()
        while not isinstance(result, Tensor):
            result = next(iter(result.values())) if isinstance(result, dict) else result[0]
        results.append(result.float())
    return float((results[0] - results[1]).norm() / results[0].norm())


def _time(steps: dict[str, _Step], repetitions: int) -> dict[str, Timing]:
    """Wall time from an idle GPU to an idle GPU: in a step, launches are a part of the cost. Modes take turns."""

    def run(mode: str) -> None:
        with use_kernels(mode):
            steps[mode].run()

    calls = {mode: partial(run, mode) for mode in steps}
    return walls(take_turns(calls, repetitions, warm_up=_WARM_UP, device=torch.device("cuda")))
