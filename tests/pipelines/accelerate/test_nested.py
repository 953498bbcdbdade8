"""`accelerate` on pipelines that carry LoRA, offloading, compiled blocks, quantised weights or a step cache."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import accelerate.big_modeling
import pytest
import torch
from accelerate_table import EXACT, usable
from accelerated import draw, state
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_group_offloading
from stock_families import family
from torch import nn

import fastgen
from fastgen.pipelines.accelerate.parts import (
    DBCache,
    FewerSteps,
    Guidance,
    Part,
    PromptPadding,
    Quantize,
    Solver,
    StepCache,
)

CPU = torch.device("cpu")


def networks(pipe: Any) -> list[nn.Module]:
    return [each for each in pipe.components.values() if isinstance(each, nn.Module)]


def with_lora(pipe: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), adapter_name="style")
    with torch.no_grad():
        for name, weight in pipe.transformer.named_parameters():
            if "lora_B" in name:
                weight.normal_()


def offloaded(pipe: Any) -> None:
    """As `enable_sequential_cpu_offload`, which takes no CPU to compute on."""
    for model in networks(pipe):
        accelerate.big_modeling.cpu_offload(model, CPU)


def offloaded_by_groups(pipe: Any) -> None:
    for model in networks(pipe):
        apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def compiled(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend="eager")


def quantised(pipe: Any) -> None:
    Quantize().enable(pipe)


def cached(pipe: Any) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))


class Own:
    """A user's attention processor."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        found = self.stock(attn, *args, **kwargs)
        return tuple(0.5 * each for each in found) if isinstance(found, tuple) else 0.5 * found


def with_own_processors(pipe: Any) -> None:
    for module in pipe.transformer.modules():
        if hasattr(module, "set_processor") and hasattr(module, "to_q"):
            module.set_processor(Own(module.processor))


LOADS: list[Any] = [with_lora, offloaded, offloaded_by_groups, compiled, cached, with_own_processors]
NEEDS_TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


@pytest.mark.parametrize("load", [*LOADS, pytest.param(quantised, marks=NEEDS_TORCHAO)])
def test_exact_and_lossy_parts_leave_what_a_pipeline_carries(load: Callable[[Any], None]) -> None:
    pipe = copy.deepcopy(family("flux"))
    load(pipe)
    expected = draw(pipe, "flux")
    before = state(pipe) if load is not offloaded else None  # its weights are on meta
    with fastgen.accelerated(pipe, plan=usable(pipe, EXACT)) as plan:
        assert plan.parts and plan.loss == "exact"
        torch.testing.assert_close(draw(pipe, "flux"), expected, atol=1e-4, rtol=0)
    lossy: tuple[Part, ...] = (Quantize(), StepCache(threshold=1e9), DBCache(1e9, warmup=1), FewerSteps())
    if load is compiled:  # compiling again for each part takes long
        lossy = (StepCache(threshold=1e9),)
    for part in usable(pipe, lossy):
        with fastgen.accelerated(pipe, plan=[part]):
            assert torch.isfinite(draw(pipe, "flux")).all()
            with pytest.raises(KeyboardInterrupt):
                draw(pipe, "flux", callback_on_step_end=stop)
    assert torch.equal(draw(pipe, "flux"), expected)
    assert before is None or state(pipe) == before


@pytest.mark.parametrize("load", [with_lora, offloaded, offloaded_by_groups, with_own_processors])
def test_parts_of_calls_and_of_prompts_leave_what_a_pipeline_carries(load: Callable[[Any], None]) -> None:
    pipe = copy.deepcopy(family("z-image"))
    load(pipe)
    expected = draw(pipe, "z-image", steps=2)
    before = state(pipe) if load is not offloaded else None
    with fastgen.accelerated(pipe) as plan:
        assert "prompt_padding" in {part.name for part in plan.parts}
        torch.testing.assert_close(draw(pipe, "z-image", steps=2), expected, atol=1e-3, rtol=0)
    with fastgen.accelerated(pipe, plan=[PromptPadding(), Solver(2.0), Guidance(0.5), FewerSteps()]):
        assert torch.isfinite(draw(pipe, "z-image", steps=4)).all()
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, "z-image", callback_on_step_end=stop)
    assert torch.equal(draw(pipe, "z-image", steps=2), expected)
    assert before is None or state(pipe) == before


def stop(*given: Any) -> Any:
    raise KeyboardInterrupt


@NEEDS_TORCHAO
def test_what_a_pipeline_carries_is_not_put_on_twice() -> None:
    pipe = copy.deepcopy(family("flux"))
    cached(pipe)
    quantised(pipe)
    assert StepCache().why_not(pipe) == "a step cache is enabled already"
    assert "its denoiser has no linear layers in blocks" in str(Quantize().why_not(pipe))


@NEEDS_TORCHAO
def test_quantised_weights_under_lora_and_compiled_blocks() -> None:
    pipe = copy.deepcopy(family("flux"))
    with_lora(pipe)
    with fastgen.accelerated(pipe, plan=[Quantize()]):
        quantised_once = draw(pipe, "flux")
        compiled(pipe)
        torch.testing.assert_close(draw(pipe, "flux"), quantised_once, atol=1e-4, rtol=0)
        pipe.transformer.set_adapters(["style"], [0.0])
        assert not torch.equal(draw(pipe, "flux"), quantised_once), "the adapter still acts on quantised weights"
