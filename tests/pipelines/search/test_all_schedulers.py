"""Every scheduler of diffusers: a search follows it, replaces it and says so, or refuses it by name."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from tiny_flows import tiny_flux, tiny_sana, tiny_sd3
from tiny_unets import BETAS, ddim, tiny_sd, with_scheduler
from torch import Tensor

from fastgen.accounting import account
from fastgen.pipelines.noise_search import NoiseSearchPipeline
from fastgen.pipelines.search.denoisers.base import Settings, denoiser_of
from fastgen.pipelines.search.names import POLICIES
from fastgen.pipelines.search.policies import Threshold
from fastgen.pipelines.search.starts import BestOfN

SCHEDULERS = sorted(
    name
    for name in dir(diffusers)
    if isinstance(kind := getattr(diffusers, name), type)
    and issubclass(kind, SchedulerMixin)
    and kind is not SchedulerMixin
)
FOLLOWED = {
    "CogVideoXDDIMScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
}
LEAST = {"rbf": 130, "svdd": 130, "code": 130, "smc": 130, "search-over-paths": 420}  # which they need at least
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def with_named(name: str, flow: bool) -> Any:
    """A pipeline with the scheduler of this class."""
    kind: Any = getattr(diffusers, name)
    try:
        scheduler = kind.from_config(FLOW if flow else dict(ddim().config))
    except (ImportError, TypeError, ValueError, NotImplementedError):
        pytest.skip("it cannot be built here")
    pipe = made_sd3() if flow else with_scheduler(tiny_sd, scheduler)
    pipe.scheduler = scheduler
    return pipe


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.float().mean(dim=(1, 2, 3)) / 255


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_is_followed_replaced_or_refused_by_name(name: str, flow: bool) -> None:
    pipe = with_named(name, flow)
    with account() as stats:
        try:
            found = denoiser_of(pipe)(pipe, ["a cat"], Settings(4))
        except ValueError as error:
            assert name in str(error)
            return
    (used, reason), = stats.paths["scheduler"].items()  # fmt: skip
    assert all(before > after for before, after in zip(found.times, found.times[1:], strict=False))
    assert (reason is None) == (name in FOLLOWED) and (used == name if reason is None else name in reason)


@pytest.mark.parametrize(
    ("name", "policy", "flow"),
    [
        pytest.param(name, policy, flow, marks=() if place % (2 * len(POLICIES)) == number else pytest.mark.slow)
        for place, name in enumerate(SCHEDULERS)
        for number, (flow, policy) in enumerate(itertools.product((False, True), POLICIES))
    ],
)
def test_each_policy_searches_with_it_or_says_why_not_and_which_can(name: str, policy: str, flow: bool) -> None:
    pipe = with_named(name, flow)
    size = {"height": 32, "width": 32} if flow else {}
    try:
        search = NoiseSearchPipeline(pipe, brightness, policy)
        found = search("a cat", num_inference_steps=2, guidance_scale=1.0, max_nfe=LEAST.get(policy, 20), **size)
    except ValueError as error:
        line = str(error)
        assert "\n" not in line and name in line
        followed = line.startswith(f"policy: {policy} ")
        assert not followed or (policy == "search-over-paths" and "best-of-n" in line and not flow)
        return
    assert len(found.images) == 1 and (policy != "search-over-paths" or flow)


def made_sd3() -> Any:
    if not _made:
        _made.append(tiny_sd3())
    return _made[0]


_made: list[Any] = []


@pytest.mark.parametrize("option", ["invert_sigmas", "stochastic_sampling"])
@pytest.mark.parametrize("make", [tiny_sd3, tiny_sana])
def test_flows_that_a_search_cannot_follow(make: Any, option: str) -> None:
    pipe = make()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**{option: True})
    arguments: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 3, "max_nfe": 60}
    arguments |= {"pipeline_kwargs": {"use_resolution_binning": False}} if make is tiny_sana else {}
    for policy in (BestOfN(n=1), Threshold(0.5)):
        with pytest.raises(ValueError, match=f"scheduler: FlowMatchEulerDiscreteScheduler with {option}"):
            NoiseSearchPipeline(pipe, brightness, policy)("a cat", **arguments)


class OwnSteps(DDIMScheduler):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


@pytest.mark.parametrize(
    ("scheduler", "word"),
    [
        (LCMScheduler(**BETAS), "LCMScheduler"),
        (OwnSteps(**BETAS), "OwnSteps"),
        (UniPCMultistepScheduler(**BETAS, use_flow_sigmas=True), "UniPCMultistepScheduler"),
        (EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", num_train_timesteps=4), "steps"),
    ],
)
def test_noise_schedulers_that_a_search_cannot_follow(scheduler: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        denoiser_of(made := with_scheduler(tiny_sd, scheduler))(made, ["a cat"], Settings(5))


@pytest.mark.parametrize(
    ("scheduler", "used"),
    [
        (HeunDiscreteScheduler(**BETAS), "DDIM"),
        (EulerAncestralDiscreteScheduler(**BETAS), "DDIM"),
        (DDPMScheduler(**BETAS), None),
        (ddim(), None),
    ],
)
@pytest.mark.parametrize("policy", [BestOfN(n=1), Threshold(-9.0)])
def test_what_is_replaced_is_reported(scheduler: Any, used: str | None, policy: Any) -> None:
    pipe, name = with_scheduler(tiny_sd, scheduler), type(scheduler).__name__
    output = NoiseSearchPipeline(pipe, brightness, policy)("a cat", num_inference_steps=3, max_nfe=40)
    report, paths = output.reports[0], output.stats.paths
    assert ("scheduler" in report.replaced) == (used is not None)
    if used is not None:
        assert report.replaced["scheduler"].startswith(f"{used}: ") and name in report.replaced["scheduler"]
        assert name in paths["scheduler"][used]
    noisy = policy.stochastic or name == "DDPMScheduler"
    assert ("sampler" in report.replaced) == noisy and report.sampler == ("ancestral" if policy.stochastic else None)
    assert report.as_dict()["replaced"] == report.replaced


def test_flows_report_it_as_well(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_sana(diffusers.DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"))
    call: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 3}
    call["pipeline_kwargs"] = {"use_resolution_binning": False}
    with caplog.at_level(logging.INFO, logger="fastgen"):
        output = NoiseSearchPipeline(pipe, brightness, BestOfN(n=1))("a cat", **call)
    assert output.reports[0].replaced == {"scheduler": f"Euler: {output.stats.paths['scheduler']['Euler']}"}
    assert "DPMSolverMultistepScheduler" in output.reports[0].replaced["scheduler"]
    flux = NoiseSearchPipeline(tiny_flux(distilled=False), brightness, Threshold(-9.0))
    report = flux("a cat", height=32, width=32, num_inference_steps=2, max_nfe=9, sampler="euler-maruyama").reports[0]
    assert "FlowMatchEulerDiscreteScheduler" in report.replaced["sampler"] and report.sampler == "euler-maruyama"
    assert torch.is_grad_enabled()
