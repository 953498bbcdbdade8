"""Adapters of Stable Diffusion, its XL and DiT, held against the pipelines themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from search_paths import deterministic
from tiny_unets import tiny_dit, tiny_sd, tiny_sdxl
from torch import Tensor

from fastgen.accounting import account
from fastgen.pipelines.search.denoisers.base import Denoiser, Settings, denoiser_of
from fastgen.pipelines.search.samplers import Ancestral

# Of unequal length, so that a batch of them is padded.
PROMPTS = ["a red circle", "two blue squares and one green star"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 4

Maker = Callable[..., Any]


@cache
def made(make: Maker, **how: Any) -> Any:
    """A pipeline that several tests use."""
    return make(ddim(), **how)


def with_scheduler(make: Maker, scheduler: Any, **how: Any) -> Any:
    pipe = made(make, **how)
    pipe.scheduler = scheduler
    return pipe


def ddim(**config: Any) -> DDIMScheduler:
    """As Stable Diffusion 1.5 has it: it decodes at the first noise level, not at 0."""
    return DDIMScheduler(**{**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **config})


def euler(**config: Any) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**{**BETAS, "timestep_spacing": "leading", "steps_offset": 1, **config})


def stock(pipe: Any, prompt: Any, seed: int, **given: Any) -> Tensor:
    """The pipeline's own picture [3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    picture: Tensor = pipe(prompt, num_inference_steps=STEPS, generator=generator, output_type="pt", **given).images[0]
    return picture


def compare(pipe: Any, settings: Settings, prompts: list[Any] = PROMPTS, **given: Any) -> None:
    """The adapter's pictures of all prompts together are the pipeline's, one at a time."""
    before = copy.deepcopy(pipe.scheduler.__dict__)
    ours = deterministic(pipe, prompts, [3, 4], settings)
    assert str(pipe.scheduler.__dict__) == str(before)
    for row, prompt in enumerate(prompts):
        theirs = stock(pipe, [prompt] if isinstance(prompt, int) else prompt, 3 + row, **given)
        assert ours[row].shape == theirs.shape
        assert float((ours[row] - theirs).abs().max()) < 2e-4
        assert float(theirs.std()) > 0.1


def denoiser(pipe: Any, prompts: list[Any] = PROMPTS, settings: Settings | None = None) -> Denoiser:
    return denoiser_of(pipe)(pipe, prompts, settings or Settings(STEPS))


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
    [*((tiny_sdxl, name) for name in SCHEDULERS), *((tiny_sd, name) for name in ("ddim", "ddim-v", "euler"))],
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


def test_defaults_are_the_pipelines_own() -> None:
    for make in (tiny_sd, tiny_dit):
        found = denoiser(with_scheduler(make, ddim()), [1] if make is tiny_dit else PROMPTS, Settings())
        assert len(found.times) == 50 and found.shape == (1, 4, 8, 8)


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
            model = found.output(latents, time.long(), zero)  # type: ignore[attr-defined]
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


@pytest.mark.parametrize(
    ("make", "settings", "word"),
    [
        (tiny_sd, Settings(height=63), "height"),
        (tiny_sd, Settings(width=20), "width"),
        (tiny_sd, Settings(height=0), "height"),
        (tiny_sd, Settings(num_inference_steps=0), "num_inference_steps"),
        (tiny_sd, Settings(num_inference_steps=1001), "num_inference_steps"),
        (tiny_sd, Settings(guidance_scale=float("nan")), "guidance_scale"),
        (tiny_sd, Settings(extra={"colour": 1}), "colour"),
        (tiny_sd, Settings(extra={"guidance_rescale": 1.5}), "guidance_rescale"),
        (tiny_sd, Settings(extra={"clip_skip": -1}), "clip_skip"),
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
    with pytest.raises(ValueError, match="scheduler: FlowMatch"):
        denoiser(with_scheduler(tiny_sd, FlowMatchEulerDiscreteScheduler()))
    with pytest.raises(ValueError, match="prediction_type"):
        flow = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        denoiser(with_scheduler(tiny_sd, flow))
    with pytest.raises(ValueError, match="num_inference_steps"):
        denoiser(with_scheduler(tiny_sd, ddim()), settings=Settings(1000))
    found = denoiser(with_scheduler(tiny_sd, ddim()))
    with pytest.raises(ValueError, match="tail_drop"):
        found.effort = {"tail_drop": 0.5}
    found.effort = {}
    assert found.effort == {}
