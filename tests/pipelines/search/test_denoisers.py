"""Adapters: the deterministic path of each is the stock pipeline's picture; and the pipeline around them."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import ZImagePipeline
from search_paths import deterministic
from tiny_pipelines import loaded

from fastgen.pipelines.loading.checkpoint import embedded_folder
from fastgen.pipelines.search.denoisers.base import Settings, denoiser_of
from fastgen.pipelines.search.interpolants import Prediction


@pytest.fixture(scope="session")
def tiny() -> ZImagePipeline:
    return loaded(ZImagePipeline, embedded_folder("tiny"))


@pytest.mark.parametrize(("guidance_scale", "negative"), [(3.0, None), (2.0, "blue"), (0.0, None)])
def test_z_image(tiny: ZImagePipeline, guidance_scale: float, negative: str | None) -> None:
    prompts = ["a red circle", "two green squares"]
    scheduler = copy.deepcopy(tiny.scheduler.__dict__)
    settings = Settings(5, guidance_scale, 64, 64, negative)
    ours = deterministic(tiny, prompts, [3, 4], settings)
    assert str(tiny.scheduler.__dict__) == str(scheduler)
    for row, prompt in enumerate(prompts):
        stock = tiny(
            prompt,
            height=64,
            width=64,
            num_inference_steps=5,
            guidance_scale=guidance_scale,
            negative_prompt=negative,
            generator=torch.Generator().manual_seed(3 + row),
            output_type="pt",
        ).images[0]
        assert float((ours[row] - stock).abs().max()) < 2e-3
        assert float(stock.std()) > 0.02


def test_samples_at_different_times_share_a_pass(tiny: ZImagePipeline) -> None:
    denoiser = denoiser_of(tiny)(tiny, ["a red circle", "a blue star"], Settings(4, 3.0, 64, 64))
    latents = torch.cat([denoiser.noise(torch.Generator().manual_seed(i)) for i in range(3)])
    times, which = torch.tensor([denoiser.times[0], denoiser.times[2], 0.31]).double(), torch.tensor([1, 0, 1])
    together = denoiser.predict(latents, times, which)
    for i in range(3):
        alone = denoiser.predict(latents[i : i + 1], times[i : i + 1], which[i : i + 1])
        assert torch.allclose(alone.clean[0], together.clean[i], atol=1e-4)
    assert isinstance(together, Prediction) and denoiser.forwards == 2


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (Settings(height=63), "height"),
        (Settings(width=20), "width"),
        (Settings(extra={"colour": 1}), "colour"),
    ],
)
def test_bad_settings_of_z_image(tiny: ZImagePipeline, settings: Settings, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        denoiser_of(tiny)(tiny, ["a red circle"], settings)


def test_a_pipeline_without_an_adapter() -> None:
    with pytest.raises(ValueError, match="Linear cannot be searched: its start noise was not found"):
        denoiser_of(torch.nn.Linear(1, 1))
