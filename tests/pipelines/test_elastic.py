"""Pipelines with dynamic chunking: knobs, Lite-CFG, schedules, and what they report."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, ZImagePipeline
from micro_models import awake, micro_dc_dit
from tiny_pipelines import loaded

import fastgen
from fastgen.models.elastic import ElasticBudget
from fastgen.models.upcycle import upcycle
from fastgen.pipelines.dc_dit import DCDiTPipeline
from fastgen.pipelines.dc_z_image import DCZImagePipeline

STEPS = 3
SIZE = {"height": 16, "width": 16, "num_inference_steps": STEPS, "output_type": "np"}  # 4 x 4 latents


@pytest.fixture(scope="module")
def z(micro_dc: Path) -> DCZImagePipeline:
    return loaded(DCZImagePipeline, micro_dc)


@pytest.fixture(scope="module")
def dit() -> DCDiTPipeline:
    return micro_dc_dit()


def draw_z(pipe: Any, prompts: Any = "a red circle", seed: int = 0, **knobs: Any) -> Any:
    return pipe(prompts, generator=torch.Generator().manual_seed(seed), **{**SIZE, **knobs})


def test_signatures_are_the_stock_ones_with_knobs() -> None:
    for ours, stock in ((DCZImagePipeline, ZImagePipeline), (DCDiTPipeline, DiTPipeline)):
        theirs = list(inspect.signature(stock.__call__).parameters)
        assert list(inspect.signature(ours.__call__).parameters) == [
            *theirs, "tail_drop", "uncond_tail_drop", "token_budget", "output_chunks"
        ]  # fmt: skip


def test_without_knobs_it_is_the_stock_pipeline(z: DCZImagePipeline, dit: DCDiTPipeline) -> None:
    stock = ZImagePipeline(**z.components)
    stock.set_progress_bar_config(disable=True)
    assert np.array_equal(draw_z(z).images, draw_z(stock).images)
    stock_dit = DiTPipeline(dit.transformer, dit.vae, dit.scheduler)
    stock_dit.set_progress_bar_config(disable=True)
    a, b = (
        pipe([1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for pipe in (dit, stock_dit)
    )
    assert np.array_equal(a, b)


def test_budget_keeps_exactly_its_number_in_every_step(z: DCZImagePipeline, dit: DCDiTPipeline) -> None:
    output = draw_z(z, token_budget=5, output_chunks=True)
    assert [chunks.lengths for chunks in output.chunks] == [(5, 5)] * STEPS
    assert output.stats.kept_tokens == [10] * STEPS and output.stats.total_tokens == [32] * STEPS
    output = dit([1, 2], num_inference_steps=2, token_budget=3, output_chunks=True, output_type="np")
    assert [chunks.lengths for chunks in output.chunks] == [(3, 3, 3, 3)] * 2
    assert draw_z(z).stats.kept_tokens != [10] * STEPS  # the budget was of that call


def test_lite_cfg_drops_in_the_unconditional_half_only(z: DCZImagePipeline) -> None:
    prompts = ["a red circle", "two blue squares"]
    full = draw_z(z, prompts, output_chunks=True).chunks[0]
    lite = draw_z(z, prompts, uncond_tail_drop=0.9, output_chunks=True).chunks[0]
    assert lite.lengths[:2] == full.lengths[:2]
    for kept, natural in zip(lite.lengths[2:], lite.natural[2:].sum(dim=1).tolist(), strict=True):
        assert kept == max(1, natural - int(0.9 * natural + 1e-9))
    assert sum(lite.lengths) < sum(full.lengths)
    # Without guidance there is no unconditional half.
    single = draw_z(z, prompts, uncond_tail_drop=0.9, guidance_scale=0.0, output_chunks=True).chunks[0]
    assert single.lengths == full.lengths[:2]


def test_schedules_by_list_and_by_function(z: DCZImagePipeline) -> None:
    asked: list[tuple[int, float]] = []

    def schedule(step: int, sigma: float) -> float:
        asked.append((step, sigma))
        return [0.0, 0.5, 0.9][step]

    by_function = draw_z(z, tail_drop=schedule, output_chunks=True)
    by_list = draw_z(z, tail_drop=[0.0, 0.5, 0.9], output_chunks=True)
    assert np.array_equal(by_function.images, by_list.images)
    for chunks, rho in zip(by_list.chunks, (0.0, 0.5, 0.9), strict=True):
        natural = chunks.natural.sum(dim=1)
        assert list(chunks.lengths) == [max(1, n - int(rho * n + 1e-9)) for n in natural.tolist()]
    steps, sigmas = zip(*asked[::2], strict=True)
    assert steps == (0, 1, 2) and sigmas[0] == pytest.approx(1.0) and list(sigmas) == sorted(sigmas, reverse=True)


def test_a_picture_does_not_depend_on_the_others(z: DCZImagePipeline) -> None:
    prompts = ["a red circle", "two blue squares and one green star"]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    both = z(prompts, generator=generators, tail_drop=0.3, **SIZE).images
    for i, prompt in enumerate(prompts):
        np.testing.assert_allclose(draw_z(z, prompt, seed=i, tail_drop=0.3).images[0], both[i], atol=2e-3)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"tail_drop": 1.0}, "tail_drop"),
        ({"tail_drop": -0.1}, "tail_drop"),
        ({"tail_drop": [0.1, 0.2]}, "tail_drop: needs one value per step"),
        ({"tail_drop": lambda step, sigma: 2.0}, "tail_drop"),
        ({"tail_drop": "0.3"}, "tail_drop"),
        ({"tail_drop": [0.1, None, 0.2]}, "tail_drop"),
        ({"uncond_tail_drop": 1.5}, "uncond_tail_drop"),
        ({"token_budget": 0}, "token_budget"),
        ({"token_budget": 17}, "token_budget"),
        ({"token_budget": 4, "tail_drop": 0.1}, "cannot be used together"),
        ({"token_budget": 4, "uncond_tail_drop": 0.1}, "cannot be used together"),
    ],
)
def test_bad_knobs(z: DCZImagePipeline, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_z(z, **knobs)


def test_a_stock_transformer_is_refused(micro_z: Path) -> None:
    stock = ZImagePipeline.from_pretrained(micro_z, torch_dtype=torch.float32)
    with pytest.raises(ValueError, match="has no dynamic chunking"):
        draw_z(DCZImagePipeline(**stock.components), tail_drop=0.3)


def test_one_line_on_and_one_line_off(micro_z: Path) -> None:
    stock = loaded(ZImagePipeline, micro_z)
    original, before = stock.transformer, draw_z(stock).images
    chunked = awake(upcycle(stock.transformer))
    fastgen.enable_dc(stock, chunked, token_budget=3)
    fastgen.enable_dc(stock, chunked, token_budget=5)  # once more sets another budget
    with chunked.record_chunks() as records:
        assert not np.array_equal(draw_z(stock).images, before)
    assert {record.chunks.lengths for record in records} == {(5, 5)}
    fastgen.disable_dc(stock)
    fastgen.disable_dc(stock)
    assert stock.transformer is original and np.array_equal(draw_z(stock).images, before)
    for bad in ({"transformer": original}, {"transformer": chunked, "uncond_tail_drop": 0.9}):
        with pytest.raises(ValueError, match="dynamic chunking|needs images"):
            fastgen.enable_dc(stock, **bad)


def test_saved_pipelines_load_with_stock_diffusers(z: DCZImagePipeline, tmp_path: Path) -> None:
    ZImagePipeline(**z.components).save_pretrained(tmp_path)
    again = loaded(ZImagePipeline, tmp_path)
    assert np.array_equal(draw_z(again).images, draw_z(z).images)


def test_budget_without_the_number_of_images_is_conditional() -> None:
    budget = ElasticBudget(0.2, uncond_tail_drop=0.9)
    assert budget.of_batch(4, 0.5) == (0.2, None)
    assert ElasticBudget(0.2, uncond_tail_drop=0.9, images=2).of_batch(4, 0.5) == ([0.2, 0.2, 0.9, 0.9], None)
    with pytest.raises(ValueError, match="step 2 needs one"):
        ElasticBudget([0.1]).of_batch(1, 0.5, step=1)
