"""UniPC in place of Euler steps, as a part and as `--scheduler`."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import fastgen
from fastgen.errors import FastgenError
from fastgen.pipelines.accelerate.parts import FewerSteps, Guidance, Solver
from fastgen.pipelines.flow_solver import unipc_of_flow
from fastgen.pipelines.loading import load_pipeline


@pytest.fixture(scope="module")
def pipe(micro_z: Path) -> Any:
    return load_pipeline(str(micro_z))


def draw(pipe: Any, steps: int) -> torch.Tensor:
    call = {"height": 16, "width": 16, "output_type": "latent", "guidance_scale": 1.0}
    found: torch.Tensor = pipe("x", num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **call)[0]
    return found


def test_it_is_taken_back_bit_for_bit(pipe: Any) -> None:
    stock, before = pipe.scheduler, draw(pipe, 4)
    with fastgen.accelerated(pipe, plan=[Solver(), Guidance(0.5), FewerSteps(0.5)]):
        assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler"
        draw(pipe, 8)
    assert pipe.scheduler is stock and torch.equal(draw(pipe, 4), before)


def test_a_scheduler_that_the_user_set_meanwhile_stays(pipe: Any) -> None:
    stock, other = pipe.scheduler, copy.deepcopy(pipe.scheduler)
    with fastgen.accelerated(pipe, plan=[Solver()]):
        pipe.scheduler = other
    assert pipe.scheduler is other
    pipe.scheduler = stock


def test_it_solves_the_same_equation(pipe: Any) -> None:
    exact = draw(pipe, 100)
    with fastgen.accelerated(pipe, plan=[Solver()]):
        assert float((draw(pipe, 100) - exact).norm()) < 0.1 * float(exact.norm())


@pytest.mark.parametrize("dynamic", [False, True])
def test_its_shift_multiplies_that_of_the_scheduler(dynamic: bool) -> None:
    euler: Any = FlowMatchEulerDiscreteScheduler(shift=2.0, use_dynamic_shifting=dynamic)
    mu = 0.7
    made = unipc_of_flow(euler, 3.0)
    levels = [1.0, 0.75, 0.5, 0.25]
    made.set_timesteps(sigmas=levels, mu=mu)
    shift = 3.0 * (math.exp(mu) if dynamic else 2.0)
    expected = [shift * level / (1 + (shift - 1) * level) for level in levels]
    torch.testing.assert_close(made.sigmas, torch.tensor([*expected, 0.0]), atol=1e-5, rtol=0)


def test_a_larger_shift_changes_the_picture_of_few_steps_and_is_taken_back(pipe: Any) -> None:
    before = draw(pipe, 3)
    with fastgen.accelerated(pipe, plan=[Solver()]):
        plain = draw(pipe, 3)
    with fastgen.accelerated(pipe, plan=[Solver(2.0)]):
        assert not torch.equal(draw(pipe, 3), plain)
    assert torch.equal(draw(pipe, 3), before)
    with pytest.raises(FastgenError, match="shift"):
        Solver(0.0)


def test_it_is_off_by_default_and_says_where_it_does_not_apply(pipe: Any) -> None:
    with fastgen.accelerated(pipe) as plan:
        assert "solver" not in {part.name for part in plan.parts}
    changed = copy.copy(pipe)
    changed.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, stochastic_sampling=True)
    assert Solver().why_not(changed) == "its scheduler has stochastic_sampling"
    changed.scheduler = load_pipeline("tiny", scheduler="UniPCMultistep").scheduler
    assert Solver().why_not(changed) == "its scheduler does not take the Euler steps of a flow model"


def test_it_is_saved_and_pickled_as_the_class_of_diffusers(micro_z: Path, tmp_path: Path) -> None:
    pipe: Any = load_pipeline(str(micro_z), scheduler="UniPCMultistep")
    assert bool(torch.isfinite(draw(pipe, 3)).all())
    pipe.save_pretrained(tmp_path / "saved")
    again: Any = load_pipeline(str(tmp_path / "saved"))
    assert again.scheduler.config.use_flow_sigmas and type(again.scheduler).__module__.startswith("diffusers")
    expected = draw(pipe, 3)
    assert torch.equal(draw(again, 3), expected)
    pipe.scheduler = pickle.loads(pickle.dumps(pipe.scheduler))
    assert torch.equal(draw(pipe, 3), expected)
