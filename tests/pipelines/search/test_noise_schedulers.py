"""Schedulers and arguments of the adapters of Stable Diffusion, its XL and DiT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from search_paths import deterministic
from tiny_unets import (
    BETAS,
    PROMPTS,
    STEPS,
    Maker,
    ddim,
    denoiser,
    euler,
    stock,
    tiny_dit,
    tiny_sd,
    tiny_sdxl,
    with_scheduler,
)

from fastgen.accounting import account
from fastgen.pipelines.search.denoisers.base import Settings
from fastgen.pipelines.search.samplers import Ancestral


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("scheduler", [ddim(), euler(), euler(timestep_spacing="linspace")])
def test_noise_is_what_the_pipeline_draws(make: Maker, scheduler: Any) -> None:
    pipe = with_scheduler(make, scheduler)
    ours = denoiser(pipe).noise(torch.Generator().manual_seed(5))
    pipe.scheduler = copy.deepcopy(scheduler)
    pipe.scheduler.set_timesteps(STEPS)
    theirs = pipe.prepare_latents(1, 4, 32, 32, torch.float32, "cpu", torch.Generator().manual_seed(5))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("clip", [False, True])
def test_ancestral_steps_are_those_of_ddpm(clip: bool, spacing: str) -> None:
    scheduler = DDPMScheduler(**BETAS, clip_sample=clip, timestep_spacing=spacing)
    found = denoiser(with_scheduler(tiny_sd, scheduler))
    path = Ancestral(found.interpolant, found.times)
    theirs = copy.deepcopy(scheduler)
    theirs.set_timesteps(STEPS)
    latents, zero = found.noise(torch.Generator().manual_seed(0)), torch.zeros(1, dtype=torch.int64)
    for index, t in enumerate(theirs.timesteps):
        time = torch.tensor([float(t)]).double()
        said = found.predict(latents, time, zero)
        with torch.no_grad():
            model = found.entries[0].output(latents, float(t), index).output  # type: ignore[attr-defined]
        after = theirs.step(model, t, latents, generator=torch.Generator().manual_seed(index)).prev_sample
        if index == STEPS - 1:
            assert torch.allclose(said.at(found.final), after, atol=1e-5)
            break
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(index))
        assert torch.allclose(path.step(latents, said, index, noise), after, atol=1e-4)
        latents = after


@pytest.mark.parametrize(
    ("make", "scheduler", "clips"),
    [
        (tiny_sd, PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True), False),
        (tiny_sdxl, DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing"), False),
        (tiny_dit, DPMSolverMultistepScheduler(timestep_spacing="leading"), False),
        (
            tiny_dit,
            EulerAncestralDiscreteScheduler.from_config(
                DDIMScheduler(clip_sample=True).config, timestep_spacing="leading"
            ),
            True,
        ),
    ],
)
def test_other_schedulers_give_way_to_ddim(make: Maker, scheduler: Any, clips: bool) -> None:
    pipe, prompts = with_scheduler(make, scheduler), [207, 1] if make is tiny_dit else PROMPTS
    with account() as stats:
        ours = deterministic(pipe, prompts, [3, 4], Settings(STEPS))
    (used,) = stats.paths["scheduler"].items()
    assert used[0] == "DDIM" and type(scheduler).__name__ in str(used[1])
    assert pipe.scheduler is scheduler
    pipe.scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=clips)
    for row, prompt in enumerate(prompts):
        theirs = stock(pipe, [prompt] if make is tiny_dit else prompt, 3 + row)
        assert float((ours[row] - theirs).abs().max()) < 2e-4


@pytest.mark.parametrize(
    ("make", "settings", "word"),
    [
        (tiny_sd, Settings(height=63, width=64), "height"),
        (tiny_sd, Settings(height=0), "height"),
        (tiny_sd, Settings(num_inference_steps=0), "num_inference_steps"),
        (tiny_sd, Settings(num_inference_steps=1001), "num_inference_steps"),
        (tiny_sd, Settings(guidance_scale=float("nan")), "guidance_scale"),
        (tiny_sd, Settings(extra={"colour": 1}), "colour"),
        (tiny_sd, Settings(extra={"guidance_rescale": "1.5"}), "guidance_rescale"),
        (tiny_sd, Settings(extra={"original_size": (32, 32)}), "original_size"),
        (tiny_sdxl, Settings(extra={"target_size": 32}), "target_size"),
        (tiny_sdxl, Settings(extra={"colour": 1}), "colour"),
        (tiny_dit, Settings(height=64), "height"),
        (tiny_dit, Settings(width=16), "width"),
        (tiny_dit, Settings(negative_prompt="fish"), "negative_prompt"),
        (tiny_dit, Settings(extra={"tail_drop": 0.5}), "tail_drop"),
        (tiny_dit, Settings(extra={"colour": 1}), "colour"),
    ],
)
def test_bad_settings(make: Maker, settings: Settings, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        denoiser(with_scheduler(make, ddim()), [1] if make is tiny_dit else PROMPTS, settings)


@pytest.mark.parametrize("prompt", ["shark", "207", -1, 1001, 1.0, True])
def test_bad_classes(prompt: Any) -> None:
    with pytest.raises(ValueError, match="prompt"):
        denoiser(with_scheduler(tiny_dit, ddim()), [prompt])


def test_bad_schedulers_and_knobs() -> None:
    with pytest.raises(ValueError, match="StableDiffusionPipeline does not run .* FlowMatch"):
        denoiser(with_scheduler(tiny_sd, FlowMatchEulerDiscreteScheduler()))
    with pytest.raises(ValueError, match="prediction_type"):
        flow = DPMSolverMultistepScheduler(use_flow_sigmas=True)
        denoiser(with_scheduler(tiny_sd, flow))
    with pytest.raises(ValueError, match="num_inference_steps"):
        denoiser(with_scheduler(tiny_sd, ddim()), settings=Settings(1000))


def test_defaults_are_the_pipelines_own() -> None:
    for make in (tiny_sd, tiny_dit):
        found = denoiser(with_scheduler(make, ddim()), [1] if make is tiny_dit else PROMPTS, Settings())
        assert len(found.times) == 50 and found.shape == (1, 4, 8, 8)
