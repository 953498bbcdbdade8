"""Adapters of models with dynamic chunking: the knobs do what they do in the pipelines, and a search can turn them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, ZImagePipeline
from micro_models import micro_dc_dit
from search_paths import deterministic

from fastgen.accounting import account
from fastgen.pipelines.dc_z_image import DCZImagePipeline
from fastgen.pipelines.elastic import disable_dc, enable_dc
from fastgen.pipelines.loading import load_pipeline
from fastgen.pipelines.search.denoisers.base import Denoiser, Settings, denoiser_of

PROMPTS = ["a red circle", "two green squares"]
STEPS = 2


@pytest.fixture(scope="module")
def z(micro_dc: Path) -> Any:
    pipe = load_pipeline(str(micro_dc), dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, DCZImagePipeline)
    return pipe


@pytest.fixture(scope="module")
def dit() -> Any:
    return micro_dc_dit()


def made(pipe: Any, extra: dict[str, Any], scale: float = 3.0) -> Denoiser:
    """The adapter, for prompts of the pipeline."""
    if isinstance(pipe, DiTPipeline):
        return denoiser_of(pipe)(pipe, [7, 2], Settings(STEPS, scale, extra=extra))
    return denoiser_of(pipe)(pipe, PROMPTS, Settings(STEPS, scale, 64, 64, extra=extra))


KNOBS: list[dict[str, Any]] = [
    {},
    {"tail_drop": 0.5},
    {"uncond_tail_drop": 0.8},
    {"tail_drop": 0.3, "uncond_tail_drop": 0.0},
    {"token_budget": 5},
]


@pytest.mark.parametrize("scale", [3.0, 0.0])
@pytest.mark.parametrize("knobs", KNOBS)
def test_z_image_with_knobs_is_the_stock_picture(z: Any, knobs: dict[str, Any], scale: float) -> None:
    with account() as ours:
        pictures = deterministic(z, PROMPTS, [3, 4], Settings(STEPS, scale, 64, 64, extra=knobs))
    assert set(ours.paths["transformer"]) == {"dynamic chunking"}
    kept = [0] * STEPS
    for row, prompt in enumerate(PROMPTS):
        stock = z(
            prompt,
            height=64,
            width=64,
            num_inference_steps=STEPS,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(3 + row),
            output_type="pt",
            **knobs,
        )
        assert float((pictures[row] - stock.images[0]).abs().max()) < 2e-3
        assert float(stock.images[0].std()) > 0.02
        kept = [before + more for before, more in zip(kept, stock.stats.kept_tokens, strict=True)]
    assert ours.kept_tokens == kept


@pytest.mark.parametrize("scale", [3.0, 1.0])
@pytest.mark.parametrize("knobs", KNOBS)
def test_dit_with_knobs_is_the_stock_picture(dit: Any, knobs: dict[str, Any], scale: float) -> None:
    with account() as ours:
        pictures = deterministic(dit, [7, 2], [3, 4], Settings(STEPS, scale, extra=knobs))
    kept = [0] * STEPS
    for row, label in enumerate([7, 2]):
        generator = torch.Generator().manual_seed(3 + row)
        stock = dit(
            [label],
            num_inference_steps=STEPS,
            guidance_scale=scale,
            generator=generator,
            output_type="pt",
            **knobs,
        )
        assert float((pictures[row] - stock.images[0]).abs().max()) < 2e-4
        assert float(stock.images[0].std()) > 0.02
        kept = [before + more for before, more in zip(kept, stock.stats.kept_tokens, strict=True)]
    assert ours.kept_tokens == kept


def kept_by(denoiser: Denoiser, samples: int = 2) -> int:
    """Tokens of an evaluation at the last time, the same one at every call."""
    latents = torch.cat([denoiser.noise(torch.Generator().manual_seed(i)) for i in range(samples)])
    last = denoiser.times[-1]
    times = torch.full((samples,), last, dtype=torch.float64)
    with account() as stats:
        denoiser.predict(
            latents * denoiser.interpolant.level(last).sigma, times, torch.zeros(samples, dtype=torch.int64)
        )
    return sum(stats.kept_tokens)


@pytest.mark.parametrize("name", ["z", "dit"])
def test_knobs_change_the_tokens_of_an_evaluation(name: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(name)
    natural, budget = kept_by(made(pipe, {})), made(pipe, {"token_budget": 3})
    assert kept_by(budget) == 2 * 2 * 3 and kept_by(budget, 3) == 2 * 3 * 3
    dropped, half = kept_by(made(pipe, {"tail_drop": 0.6})), kept_by(made(pipe, {"uncond_tail_drop": 0.6}))
    assert 2 * 2 * 3 != dropped <= half < natural


@pytest.mark.parametrize(
    ("knobs", "word"),
    [
        ({"tail_drop": [0.1, 0.2]}, "tail_drop"),
        ({"tail_drop": lambda step, sigma: 0.5}, "tail_drop"),
        ({"tail_drop": None}, "tail_drop"),
        ({"tail_drop": True}, "tail_drop"),
        ({"tail_drop": 1.0}, "tail_drop"),
        ({"uncond_tail_drop": [0.1, 0.2]}, "uncond_tail_drop"),
        ({"uncond_tail_drop": -0.1}, "uncond_tail_drop"),
        ({"token_budget": 0}, "token_budget"),
        ({"token_budget": 5.0}, "token_budget"),
        ({"token_budget": 100_000}, "token_budget"),
        ({"token_budget": 5, "tail_drop": 0.1}, "token_budget"),
        ({"colour": 1}, "colour"),
    ],
)
@pytest.mark.parametrize("name", ["z", "dit"])
def test_bad_knobs(name: str, knobs: dict[str, Any], word: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(name)
    with pytest.raises(ValueError, match=word):
        made(pipe, knobs)


def test_a_stock_pipeline_with_enable_dc(dit: Any) -> None:
    stock = DiTPipeline(dit.transformer, dit.vae, dit.scheduler)
    try:
        enable_dc(stock, uncond_tail_drop=0.6, images=1)
        # Any number of times, whatever `images` says: a search's batches are not those of a pipeline.
        assert kept_by(made(stock, {})) == kept_by(made(dit, {"uncond_tail_drop": 0.6}))
        assert kept_by(made(dit, {})) > kept_by(made(stock, {}))
        assert kept_by(made(stock, {"token_budget": 2})) == 2 * 2 * 2
        enable_dc(stock, tail_drop=[0.1] * STEPS)
        with pytest.raises(ValueError, match="tail_drop"):
            made(stock, {})
    finally:
        disable_dc(stock)


def test_held_tokens_and_models_without_knobs(dit: Any, micro_z: Any) -> None:
    dit.transformer.hold_chunks(2)
    try:
        with pytest.raises(ValueError, match="transformer: a search cannot use"):
            made(dit, {})
    finally:
        dit.transformer.hold_chunks(None)
    plain = ZImagePipeline.from_pretrained(micro_z, torch_dtype=torch.float32)
    with pytest.raises(ValueError, match="tail_drop: ZImageTransformer2DModel has no dynamic chunking"):
        made(plain, {"tail_drop": 0.5})
    with pytest.raises(ValueError, match="transformer: ZImageTransformer2DModel"):
        made(DCZImagePipeline(**plain.components), {})
