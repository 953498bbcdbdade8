"""`accelerate` on pipelines of many families: what it promises, and that `restore` gives back what was there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerated import draw, state
from stock_families import family

import fastgen
from fastgen.environment import versions
from fastgen.errors import FastgenError
from fastgen.pipelines.accelerate.calls import change_calls
from fastgen.pipelines.accelerate.parts import PARTS, Compile, FewerSteps, Guidance, Kernels, StepCache
from fastgen.pipelines.accelerate.plan import Row, denoiser_digest


def test_the_table_says_what_is_on_and_why_not() -> None:
    pipe = family("flux")
    with fastgen.pipelines.accelerate.accelerated(pipe) as plan:
        table = str(plan)
    assert "FluxPipeline, loss contract exact" in table
    rows = {line.split()[0]: line for line in table.splitlines()}
    assert rows["kernels"].split()[:3] == ["kernels", "off", "exact"] and "Triton kernels need a GPU" in table
    assert all(name in table for name in PARTS)


def test_guidance_on_half_of_the_steps_of_z_image_halves_the_later_batches() -> None:
    pipe, rows = family("z-image"), []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    with fastgen.accelerated(pipe, plan=[Guidance(share=0.5)]):
        draw(pipe, "z-image", steps=4)
        draw(pipe, "z-image", steps=2, cfg_truncation=1.0)
    hook.remove()
    assert rows == [2, 2, 1, 1] + [2, 2]


@pytest.mark.parametrize("name", ["stable-diffusion", "sdxl", "pixart-sigma", "sana", "z-image", "sd3", "hunyuan-dit"])
def test_guidance_on_no_step_is_the_conditional_prediction(name: str) -> None:
    pipe = family(name)
    guided, unguided = draw(pipe, name), draw(pipe, name, guidance_scale=1.0 if name != "z-image" else 0.0)
    passes: list[int] = []
    model = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    hook = model.register_forward_hook(lambda module, args, output: passes.append(1))
    with fastgen.accelerated(pipe, plan=[Guidance(share=0.0)]):
        drawn = draw(pipe, name)
    hook.remove()
    torch.testing.assert_close(drawn, unguided, atol=2e-4, rtol=0)
    assert float((guided - unguided).abs().max()) > 1e-3
    assert torch.equal(draw(pipe, name), guided)


def test_guidance_on_a_share_of_the_steps_halves_the_later_batches() -> None:
    pipe, rows = family("stable-diffusion"), []
    hook = pipe.unet.conv_in.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    with fastgen.accelerated(pipe, plan=[Guidance(share=0.5)]):
        draw(pipe, "stable-diffusion", steps=4)
        draw(pipe, "stable-diffusion", steps=3)
        draw(pipe, "stable-diffusion", steps=2, guidance_scale=1.0)
    hook.remove()
    assert rows == [2, 2, 1, 1] + [2, 2, 1] + [1, 1]


def test_fewer_steps_are_those_of_the_plan_also_by_default() -> None:
    pipe, seen = family("flux"), []
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: seen.append(1))
    with fastgen.accelerated(pipe, plan=[FewerSteps(share=0.5)]):
        half = draw(pipe, "flux", steps=6)
        assert len(seen) == 3
        pipe("x", height=32, width=32, output_type="latent")
        assert len(seen) == 3 + 14  # of 28
    hook.remove()
    assert torch.equal(half, draw(pipe, "flux", steps=3))


@pytest.mark.parametrize("name", ["flux", "z-image", "qwen-image", "sd3"])
def test_a_step_cache_is_on_inside_and_gone_after(name: str) -> None:
    pipe = family(name)
    if (reason := StepCache().why_not(pipe)) is not None:
        with pytest.raises(FastgenError, match=reason):
            fastgen.accelerate(pipe, plan=[StepCache()])
        return
    expected, before = draw(pipe, name), state(pipe)
    with fastgen.accelerated(pipe, plan=[StepCache(threshold=1e9)]) as plan:
        assert plan.loss == "lossy"
        first, again = draw(pipe, name), draw(pipe, name)
    assert not torch.equal(first, expected) and torch.equal(first, again)
    assert torch.equal(draw(pipe, name), expected)
    assert {key: value for key, value in state(pipe).items() if before.get(key) != value} == {}


def test_parts_of_a_plan_add_up() -> None:
    pipe, rows = family("stable-diffusion"), []
    hook = pipe.unet.conv_in.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    with fastgen.accelerated(pipe, plan=[Guidance(share=0.5), FewerSteps(share=0.5)]):
        draw(pipe, "stable-diffusion", steps=8)
    hook.remove()
    assert rows == [2, 2, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "z-image", "stable-diffusion"])
def test_compiled_blocks_draw_the_same_and_are_plain_again(name: str) -> None:
    pipe = family(name)
    expected, before = draw(pipe, name), state(pipe)
    with fastgen.accelerated(pipe, plan=[Compile()]):
        difference = float((draw(pipe, name) - expected).abs().max())
        assert difference <= 1e-3 * max(1.0, float(expected.std()))
    assert state(pipe) == before and torch.equal(draw(pipe, name), expected)


# ---- all or nothing ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "small"}, "loss: 'small' is unknown"),
        ({"loss": "lossy"}, "loss: 'lossy' needs a plan"),
        ({"loss": "exact", "plan": [FewerSteps()]}, "fewer_steps is not allowed under loss='exact'"),
        ({"plan": "nothing.json"}, "there is no file 'nothing.json'"),
        ({"plan": [5]}, "needs a Plan"),
        ({"plan": 5}, "needs a Plan"),
        ({"plan": [FewerSteps(), FewerSteps(share=0.2)]}, "fewer_steps is in it twice"),
        ({"plan": [FewerSteps(), Kernels()]}, "kernels cannot be used .*: Triton kernels need a GPU"),
        ({"plan": fastgen.Plan("SanaPipeline", ())}, "is of a SanaPipeline, and this is a FluxPipeline"),
    ],
)
def test_what_is_refused_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    pipe = family("flux")
    before = state(pipe)
    with pytest.raises(FastgenError, match=message):
        fastgen.accelerate(pipe, **arguments)
    assert state(pipe) == before


def test_a_part_that_fails_half_way_takes_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = family("flux")
    before = state(pipe)

    def fail(self: Any, pipe: Any) -> Callable[[], None]:
        raise KeyboardInterrupt

    monkeypatch.setattr(FewerSteps, "enable", fail)
    with pytest.raises(KeyboardInterrupt):
        fastgen.accelerate(pipe, plan=[PARTS["channels_last"](), Guidance.__new__(FewerSteps)])
    assert state(pipe) == before


@pytest.mark.parametrize("wrong", [5, None, torch.nn.Linear(1, 1), "flux"])
def test_only_pipelines_with_a_denoiser(wrong: Any) -> None:
    with pytest.raises(FastgenError, match="pipe: needs a diffusers pipeline"):
        fastgen.accelerate(wrong)


def test_doing_it_twice_is_doing_it_once() -> None:
    pipe = family("stable-diffusion")
    before = state(pipe)
    fastgen.accelerate(pipe, plan=[FewerSteps(share=0.5)])
    fastgen.accelerate(pipe)
    assert type(pipe) is before["class"]
    fastgen.restore(pipe)
    fastgen.restore(pipe)
    assert state(pipe) == before


def test_an_error_in_a_call_leaves_it_accelerated_and_restorable() -> None:
    pipe = family("stable-diffusion")
    before, expected = state(pipe), draw(pipe, "stable-diffusion")

    def stop(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with fastgen.accelerated(pipe, plan=[Guidance(share=0.5)]):
        first = draw(pipe, "stable-diffusion")
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, "stable-diffusion", callback_on_step_end=stop)
        assert torch.equal(draw(pipe, "stable-diffusion"), first)
    after = state(pipe)
    assert {key: value for key, value in after.items() if before.get(key) != value and "." in key} == {}
    assert torch.equal(draw(pipe, "stable-diffusion"), expected)


def test_a_pipeline_with_changed_calls_is_saved_copied_and_pickled_as_its_class(tmp_path: Path) -> None:
    pipe = copy.deepcopy(family("stable-diffusion"))
    stock = type(pipe)
    undo = change_calls(pipe, lambda given: given.update(num_inference_steps=1))
    assert isinstance(pipe, stock) and type(pipe).__name__ == stock.__name__
    pipe.save_pretrained(tmp_path)
    assert type(stock.from_pretrained(tmp_path)) is stock
    assert type(copy.deepcopy(pipe)) is stock and type(pickle.loads(pickle.dumps(pipe))) is stock
    undo()
    assert type(pipe) is stock


def test_two_pipelines_of_one_model_keep_their_calls_apart() -> None:
    pipe = family("stable-diffusion")
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    expected = draw(other, "stable-diffusion", steps=6)
    with fastgen.accelerated(pipe, plan=[FewerSteps(share=0.5)]):
        assert torch.equal(draw(other, "stable-diffusion", steps=6), expected)
        assert not torch.equal(draw(pipe, "stable-diffusion", steps=6), expected)


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    with fastgen.accelerated(family("flux"), plan=[FewerSteps(share=0.75), StepCache(threshold=0.2)]) as plan:
        plan.save(tmp_path / "plan.json")
    assert fastgen.Plan.load(tmp_path / "plan.json") == plan
    with fastgen.accelerated(family("flux"), plan=tmp_path / "plan.json") as again:
        assert again == plan


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({"denoiser": "0" * 16, "model": "other"}, "another FluxPipeline, 'other'"),
        ({"versions": {"fastgen": "0.0.0"}}, "with fastgen 0.0.0, and this is"),
        ({"versions": {"diffusers": "0.1.0", "torch": "1.0"}}, "with diffusers 0.1.0, and this is"),
    ],
)
def test_a_plan_that_was_measured_elsewhere_is_refused_and_changes_nothing(
    measured: dict[str, Any], message: str
) -> None:
    pipe = family("flux")
    expected = draw(pipe, "flux")
    plan = fastgen.Plan("FluxPipeline", (Row(FewerSteps(share=0.5), True),), measured)
    with pytest.raises(FastgenError, match=message):
        fastgen.accelerate(pipe, plan=plan)
    assert torch.equal(draw(pipe, "flux"), expected)
    own = {"denoiser": denoiser_digest(pipe), "versions": versions(), "weights": "known to the command line only"}
    with fastgen.accelerated(pipe, plan=fastgen.Plan("FluxPipeline", plan.rows, own)) as on:
        assert [part.name for part in on.parts] == ["fewer_steps"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2; .* reads 1; update fastgen"),
        ({"parts": 5}, "needs a pipeline, parts"),
        ({"parts": [5]}, "a part must be an object"),
        ({"parts": [{"part": "magic"}]}, "part 'magic' is unknown"),
        ({"parts": [{"part": "fewer_steps", "settings": {"speed": 2}}]}, "fewer_steps has no setting 'speed'"),
        ({"parts": [{"part": "fewer_steps", "settings": {"share": 2}}]}, "fewer_steps: share: 2"),
        ({"parts": [{"part": "fewer_steps", "settings": 5}]}, "settings of fewer_steps must be"),
        ({"parts": [{"part": "step_cache", "settings": {"kind": []}}]}, "step_cache: kind"),
    ],
)
def test_a_broken_plan_is_one_line(change: dict[str, Any], message: str) -> None:
    whole = fastgen.Plan("FluxPipeline", ()).as_dict()
    with pytest.raises(FastgenError, match=message):
        fastgen.Plan.of_dict(whole | change)
