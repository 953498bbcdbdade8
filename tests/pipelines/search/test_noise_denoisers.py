"""Adapters of Stable Diffusion, its XL and DiT, held against the pipelines themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from long_tail import long_tail
from search_paths import deterministic
from tiny_unets import (
    PROMPTS,
    STEPS,
    Maker,
    compare,
    ddim,
    denoiser,
    euler,
    stock,
    tiny_dit,
    tiny_sd,
    tiny_sdxl,
    with_scheduler,
)
from torch import Tensor

from fastgen.pipelines.search.denoisers.base import Settings

V = {"prediction_type": "v_prediction"}
SCHEDULERS = {
    "ddim": ddim(),
    "ddim-v": ddim(**V),
    "ddim-sample": ddim(prediction_type="sample", set_alpha_to_one=True),
    "ddim-clipped": ddim(clip_sample=True),
    "ddim-thresholded": ddim(thresholding=True, sample_max_value=2.0),
    "ddim-zero-snr": ddim(**V, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    "euler": euler(),
    "euler-v": euler(**V),
    "euler-sample": euler(prediction_type="sample"),
    "euler-linspace": euler(timestep_spacing="linspace"),
    "euler-karras": euler(use_karras_sigmas=True),
    "euler-sigma-min": euler(final_sigmas_type="sigma_min"),
    "euler-continuous": euler(**V, timestep_type="continuous", use_karras_sigmas=True),
    # What another scheduler is configured with is nothing to Euler.
    "euler-hidden": EulerDiscreteScheduler.from_config(ddim(clip_sample=True).config),
}


@pytest.mark.parametrize(
    ("make", "name"),
    long_tail(
        [*((tiny_sdxl, name) for name in SCHEDULERS), *((tiny_sd, name) for name in ("ddim", "ddim-v", "euler"))],
        fast=[
            *((tiny_sdxl, name) for name in ("ddim-zero-snr", "ddim-thresholded", "euler-v", "euler-continuous")),
            *((tiny_sd, name) for name in ("ddim", "ddim-v", "euler")),
        ],
        unpack=True,
    ),
)
def test_stable_diffusion_is_the_stock_picture(make: Maker, name: str) -> None:
    compare(with_scheduler(make, SCHEDULERS[name]), Settings(STEPS))


@pytest.mark.parametrize(
    ("make", "name", "given"),
    [
        (tiny_sd, "ddim", {"guidance_scale": 1.0}),
        (tiny_sd, "ddim", {"guidance_scale": 3.0, "negative_prompt": "blue", "guidance_rescale": 0.7}),
        (tiny_sd, "euler", {"guidance_scale": 2.0, "height": 40, "width": 24}),
        (tiny_sdxl, "euler", {"guidance_scale": 1.0}),
        (tiny_sdxl, "euler", {"guidance_scale": 3.0, "negative_prompt": "blue", "guidance_rescale": 0.7}),
        (tiny_sdxl, "ddim", {"height": 40, "width": 24, "clip_skip": 1, "negative_prompt": ""}),
        (
            tiny_sdxl,
            "euler",
            {"original_size": (64, 48), "crops_coords_top_left": (8, 4), "target_size": (32, 64)},
        ),
    ],
)
def test_arguments_of_stable_diffusion(make: Maker, name: str, given: dict[str, Any]) -> None:
    own = {"guidance_scale", "negative_prompt", "height", "width"}
    extra = {key: value for key, value in given.items() if key not in own}
    settings = Settings(STEPS, **{key: value for key, value in given.items() if key in own}, extra=extra)
    pipe = with_scheduler(make, SCHEDULERS[name])
    assert denoiser(pipe, settings=settings).forwards == (1 if given.get("guidance_scale") == 1.0 else 2)
    compare(pipe, settings, **given)


def test_a_distilled_model_reads_the_guidance_scale() -> None:
    pipe = tiny_sd(ddim(), distilled=True)
    assert denoiser(pipe).forwards == 1
    compare(pipe, Settings(STEPS, 6.0), guidance_scale=6.0)


@pytest.mark.parametrize("scheduler", [ddim(steps_offset=0), DDIMScheduler(), DDIMScheduler(prediction_type="sample")])
@pytest.mark.parametrize("doubled", [True, False])
@pytest.mark.parametrize("scale", [None, 4.0, 1.0])
def test_dit_is_the_stock_picture(scheduler: Any, doubled: bool, scale: float | None) -> None:
    pipe = with_scheduler(tiny_dit, scheduler, doubled=doubled)
    given = {} if scale is None else {"guidance_scale": scale}
    compare(pipe, Settings(STEPS, scale), [207, 1], **given)
    assert denoiser(pipe, [207], Settings(STEPS, scale)).forwards == (1 if scale == 1.0 else 2)


def test_classes_by_name() -> None:
    pipe = with_scheduler(tiny_dit, ddim())
    named = deterministic(pipe, ["golden retriever", "goldfish"], [3, 4], Settings(STEPS))
    assert torch.equal(named, deterministic(pipe, [207, 1], [3, 4], Settings(STEPS)))
    assert pipe.get_label_ids(["golden retriever", "goldfish"]) == [207, 1]


@pytest.mark.parametrize(
    ("make", "scheduler", "prompts"),
    [
        (tiny_sd, ddim(), PROMPTS),
        (tiny_sdxl, euler(), PROMPTS),
        (tiny_sdxl, ddim(thresholding=True), PROMPTS),
        (tiny_dit, ddim(), [3, 1]),
    ],
)
def test_samples_at_different_times_share_a_pass(make: Maker, scheduler: Any, prompts: list[Any]) -> None:
    found = denoiser(with_scheduler(make, scheduler), prompts)
    latents = torch.cat([found.noise(torch.Generator().manual_seed(i)) for i in range(3)])
    times, which = torch.tensor([found.times[i] for i in (0, 3, 1)]).double(), torch.tensor([1, 0, 1])
    together = found.predict(latents, times, which)
    for i in range(3):
        alone = found.predict(latents[i : i + 1], times[i : i + 1], which[i : i + 1])
        level = found.interpolant.level(float(times[i]))
        assert torch.allclose(alone.clean[0], together.clean[i], rtol=1e-4, atol=1e-4)
        assert torch.allclose(alone.noise[0], together.noise[i], rtol=1e-4, atol=1e-4)
        if not found.pipe.scheduler.config.get("thresholding"):
            assert torch.allclose(alone.at(level)[0], latents[i], rtol=1e-4, atol=1e-4)


def test_unsafe_pictures_are_black(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = with_scheduler(tiny_sd, ddim())

    def check(pictures: Tensor, device: Any, dtype: Any) -> tuple[Tensor, list[bool]]:
        unsafe = [float(picture.clamp(-1, 1).mean()) > middle for picture in pictures]
        return torch.stack([p * (not bad) for p, bad in zip(pictures, unsafe, strict=True)]), unsafe

    means = deterministic(pipe, PROMPTS, [3, 4], Settings(STEPS)).mul(2).sub(1).flatten(1).mean(dim=1)
    middle = float(means.mean())
    monkeypatch.setattr(pipe, "run_safety_checker", check)
    ours = deterministic(pipe, PROMPTS, [3, 4], Settings(STEPS))
    assert [bool(picture.any()) for picture in ours] == [float(mean) <= middle for mean in means]
    for row, prompt in enumerate(PROMPTS):
        assert torch.allclose(ours[row], stock(pipe, prompt, 3 + row), atol=2e-4)


def test_the_vae_of_xl() -> None:
    pipe = tiny_sdxl(euler())
    pipe.vae.register_to_config(latents_mean=[0.5, -1.0, 0.2, 0.0], latents_std=[2.0, 0.5, 1.0, 1.5])
    compare(pipe, Settings(STEPS))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    single = denoiser(pipe).decode(latents)
    pipe.vae.half()
    weights = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
    found = denoiser(pipe).decode(latents)
    assert found.dtype == torch.float32 and torch.allclose(single, found, atol=2e-2)
    assert pipe.vae.dtype == torch.float16
    assert all(torch.equal(value, weights[name]) for name, value in pipe.vae.state_dict().items())

    class Marker:
        def apply_watermark(self, pictures: Tensor) -> Tensor:
            return -pictures

    pipe.watermark = Marker()
    assert torch.allclose(denoiser(pipe).decode(latents), 1 - found, atol=1e-6)
