"""Denoisers of FLUX.1, Stable Diffusion 3, Qwen-Image and Sana, held against the pipelines themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import tiny_flows as tiny
import torch
from diffusers import DPMSolverMultistepScheduler
from search_paths import deterministic

from fastgen.pipelines.search.denoisers.base import Denoiser, Settings, denoiser_of

# Of unequal length, so that a batch of them is padded.
PROMPTS = ["a red circle", "two green squares left of a yellow heart"]
# Not square: rows and columns are not to be mixed up.
HEIGHT, WIDTH, STEPS = 64, 32, 4
UNBINNED = {"use_resolution_binning": False}
DPM = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

MAKERS: dict[str, Callable[[], Any]] = {
    "flux": partial(tiny.tiny_flux, distilled=True),
    "schnell": partial(tiny.tiny_flux, distilled=False),
    "sd3": tiny.tiny_sd3,
    "sd3-dynamic": partial(tiny.tiny_sd3, dynamic=True),
    "qwen": tiny.tiny_qwen_image,
    "sana": tiny.tiny_sana,
    "sana-variance": partial(tiny.tiny_sana, doubled=True),
    "sana-binned": partial(tiny.tiny_sana, sample_size=16, blocks=6),
    "sana-1024": partial(tiny.tiny_sana, sample_size=32),
}
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("flux", {}, 1),
    ("flux", {"guidance_scale": 1.5, "negative_prompt": "blue", "true_cfg_scale": 3.0}, 2),
    ("flux", {"negative_prompt": "blue"}, 1),
    ("schnell", {"guidance_scale": 0.0, "max_sequence_length": 12}, 1),
    ("sd3", {}, 2),
    ("sd3", {"guidance_scale": 3.0, "negative_prompt": "blue"}, 2),
    ("sd3", {"guidance_scale": 1.0, "max_sequence_length": 12}, 1),
    ("sd3-dynamic", {"guidance_scale": 2.0}, 2),
    ("qwen", {}, 1),
    ("qwen", {"negative_prompt": "blue and green stars"}, 2),
    ("qwen", {"negative_prompt": " ", "true_cfg_scale": 2.0, "max_sequence_length": 12}, 2),
    ("qwen", {"negative_prompt": "blue", "true_cfg_scale": 1.0}, 1),
    ("sana", UNBINNED, 2),
    ("sana", {"guidance_scale": 2.0, "negative_prompt": "blue", "complex_human_instruction": None, **UNBINNED}, 2),
    ("sana", {"guidance_scale": 1.0, "max_sequence_length": 40, **UNBINNED}, 1),
    ("sana-variance", {"guidance_scale": 2.0, **UNBINNED}, 2),
    ("sana-binned", {"height": 300, "width": 460, "guidance_scale": 1.0}, 1),
]


@cache
def made(name: str) -> Any:
    return MAKERS[name]()


def settings_of(arguments: dict[str, Any]) -> Settings:
    fields = set(vars(Settings())) - {"extra"}
    own = {name: value for name, value in arguments.items() if name in fields}
    return Settings(**own, extra={name: value for name, value in arguments.items() if name not in fields})


def state(pipe: Any) -> str:
    """What an adapter might change of a pipeline."""
    sides = {name: part.padding_side for name, part in pipe.components.items() if "tokenizer" in name}
    own = {name: value for name, value in vars(pipe).items() if name not in pipe.components}
    return f"{sides} {vars(pipe.scheduler)} {own}"


def stock(pipe: Any, prompt: str, seed: int, arguments: dict[str, Any]) -> torch.Tensor:
    """The pipeline's own picture [3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    pictures: torch.Tensor = pipe(prompt, **arguments, generator=generator, output_type="pt").images
    return pictures[0]


def denoiser(name: str, prompts: list[str], **arguments: Any) -> Denoiser:
    pipe = made(name)
    if name.startswith("sana"):
        arguments = {**UNBINNED, **arguments}
    arguments = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, **arguments}
    return denoiser_of(pipe)(pipe, prompts, settings_of(arguments))


@pytest.mark.parametrize(("name", "given", "forwards"), CASES)
def test_the_deterministic_path_is_the_pipelines_picture(name: str, given: dict[str, Any], forwards: int) -> None:
    arguments = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, **given}
    pipe = made(name)
    before = state(pipe)
    ours = deterministic(pipe, PROMPTS, [3, 4], settings_of(arguments))
    assert state(pipe) == before
    assert denoiser_of(pipe)(pipe, PROMPTS, settings_of(arguments)).forwards == forwards
    for row, prompt in enumerate(PROMPTS):
        picture = stock(pipe, prompt, 3 + row, arguments)
        assert picture.shape == ours[row].shape == (3, arguments["height"], arguments["width"])
        assert float((ours[row] - picture).abs().max()) < 1e-4
        assert float(picture.std()) > 0.05
    # The prompt counts, not the noise only.
    others = deterministic(pipe, PROMPTS[::-1], [3, 4], settings_of(arguments))
    assert float((ours - others).abs().max()) > 0.02


@pytest.mark.parametrize(("name", "given"), [
    ("flux", {"negative_prompt": "blue", "true_cfg_scale": 2.0}),
    ("sd3", {}),
    ("qwen", {"negative_prompt": "blue"}),
    ("sana", {}),
])  # fmt: skip
def test_evaluations_of_several_prompts_and_times_are_those_of_each_alone(name: str, given: dict[str, Any]) -> None:
    ours = denoiser(name, PROMPTS, **given)
    latents = torch.cat([ours.noise(torch.Generator().manual_seed(i)) for i in range(3)])
    times, which = torch.tensor([ours.times[0], ours.times[2], 0.31]).double(), torch.tensor([1, 0, 1])
    together = ours.predict(latents, times, which)
    for i in range(3):
        alone = ours.predict(latents[i : i + 1], times[i : i + 1], which[i : i + 1])
        assert torch.allclose(alone.clean[0], together.clean[i], atol=1e-4)
    late = ours.predict(latents, times.flip(0), which)
    assert float((late.clean[1] - together.clean[1]).abs().max()) < 1e-4
    level = ours.interpolant.level(0.5)
    assert float((late.velocity(level) - together.velocity(level))[0].abs().max()) > 0.05


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen", "sana"])
def test_noise_is_drawn_in_the_dtype_of_the_pipeline(name: str) -> None:
    pipe = copy.deepcopy(made(name)).to(torch.bfloat16)
    arguments = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, **(UNBINNED if name == "sana" else {})}
    drawn: list[torch.Tensor] = []
    prepare = pipe.prepare_latents

    def spy(*args: Any, **kwargs: Any) -> Any:
        out = prepare(*args, **kwargs)
        drawn.append(out[0] if isinstance(out, tuple) else out)
        return out

    pipe.prepare_latents = spy
    picture = stock(pipe, PROMPTS[0], 5, arguments)
    del pipe.prepare_latents
    ours = denoiser_of(pipe)(pipe, PROMPTS[:1], settings_of(arguments))
    noise = ours.noise(torch.Generator().manual_seed(5))
    assert noise.dtype == torch.float32 and torch.equal(noise, drawn[0].float())
    assert float((deterministic(pipe, PROMPTS[:1], [5], settings_of(arguments))[0] - picture).abs().mean()) < 0.02


def test_sana_takes_the_sigmas_of_a_flow_solver() -> None:
    scheduler = DPMSolverMultistepScheduler(solver_order=1, **DPM)
    pipe = tiny.tiny_sana(scheduler)
    arguments = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 5, "guidance_scale": 2.0, **UNBINNED}
    ours = deterministic(pipe, PROMPTS, [3, 4], settings_of(arguments))
    for row, prompt in enumerate(PROMPTS):
        # Of first order the solver is Euler's.
        assert float((ours[row] - stock(pipe, prompt, 3 + row, arguments)).abs().max()) < 1e-4


@pytest.mark.parametrize(("name", "given", "word"), [
    ("flux", {"colour": 1}, "colour"),
    ("flux", {"max_sequence_length": 513}, "max_sequence_length"),
    ("flux", {"num_inference_steps": 0}, "num_inference_steps"),
    ("sd3", {"height": 36}, "height"),
    ("sd3", {"width": 0}, "width"),
    ("sd3", {"true_cfg_scale": 2.0}, "true_cfg_scale"),
    ("flux", {"true_cfg_scale": "2", "negative_prompt": "x"}, "true_cfg_scale"),
    ("flux", {"max_sequence_length": 12.5}, "max_sequence_length"),
    ("qwen", {"colour": 1}, "colour"),
    ("qwen", {"max_sequence_length": 1025}, "max_sequence_length"),
    ("sana", {"height": 48}, "height"),
    ("sana", {"width": 16}, "width"),
    ("sana", {"colour": 1}, "colour"),
    ("sana", {"use_resolution_binning": True}, "sample size"),
])  # fmt: skip
def test_bad_settings(name: str, given: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        denoiser(name, PROMPTS, **given)
