"""A budget belongs to the call: by step from its first step, in threads, in copies, and refused where it is wrong."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, HeunDiscreteScheduler, ZImageImg2ImgPipeline, ZImagePipeline
from micro_models import awake, micro_dc_dit
from PIL import Image
from tiny_pipelines import loaded

import fastgen
from fastgen.models.upcycle import upcycle
from fastgen.pipelines.dc_z_image import DCZImagePipeline

STEPS = 4
SIZE = {"height": 16, "width": 16, "num_inference_steps": STEPS, "output_type": "np", "guidance_scale": 2.0}


def late(step: int, sigma: float) -> float:
    return 0.0 if step < 2 else 0.9


@pytest.fixture
def stock(micro_z: Path) -> ZImagePipeline:
    return loaded(ZImagePipeline, micro_z)


@pytest.fixture
def chunked(stock: ZImagePipeline) -> Any:
    return awake(upcycle(stock.transformer))


def other(pipe: Any, transformer: Any, kind: type = ZImagePipeline) -> Any:
    made = kind(**{**pipe.components, "transformer": transformer, "scheduler": copy.deepcopy(pipe.scheduler)})
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, **arguments: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe(**{"prompt": "a red circle", **SIZE, "generator": generator, **arguments}).images


@pytest.mark.parametrize(
    "drops", [late, [0.0, 0.0, 0.9, 0.9], torch.tensor([0.0, 0.0, 0.9, 0.9])], ids=("function", "list", "tensor")
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_every_generation_begins_at_the_first_step(stock: Any, chunked: Any, drops: Any, error: Any) -> None:
    expected = draw(other(stock, chunked, DCZImagePipeline), tail_drop=drops)
    fastgen.enable_dc(stock, chunked, tail_drop=drops)

    def interrupt(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            raise error
        return {}

    for _ in range(2):
        assert np.array_equal(draw(stock), expected)
        with pytest.raises(error):
            draw(stock, callback_on_step_end=interrupt)


@pytest.mark.parametrize("drops", [[0.1] * 3, [0.1] * 5, []])
def test_a_list_of_the_wrong_length_is_refused_before_the_first_step(stock: Any, chunked: Any, drops: Any) -> None:
    seen: list[int] = []
    report = lambda pipe, step, *_: seen.append(step) or {}  # noqa: E731
    ours = other(stock, chunked, DCZImagePipeline)
    fastgen.enable_dc(stock, chunked, tail_drop=drops)
    for pipe, knobs in ((stock, {}), (ours, {"tail_drop": drops})):
        with pytest.raises(ValueError, match=r"tail_drop: needs one value per step \(4\)"):
            draw(pipe, callback_on_step_end=report, **knobs)
    assert seen == []


def test_steps_are_those_of_the_loop(stock: Any, chunked: Any) -> None:
    """Fewer with `strength`, more with schedulers of several evaluations a step."""
    img2img = other(stock, chunked, ZImageImg2ImgPipeline)
    fastgen.enable_dc(img2img, tail_drop=[0.1, 0.9])
    draw(img2img, image=Image.new("RGB", (16, 16)), strength=0.5)
    with pytest.raises(ValueError, match=r"one value per step \(4\)"):
        draw(img2img, image=Image.new("RGB", (16, 16)), strength=1.0)
    dc = micro_dc_dit()
    dit = DiTPipeline(dc.transformer, dc.vae, HeunDiscreteScheduler())
    dit.set_progress_bar_config(disable=True)
    fastgen.enable_dc(dit, tail_drop=[0.5] * 5)
    dit([1], num_inference_steps=3)
    fastgen.enable_dc(dit, tail_drop=[0.5] * 3)
    with pytest.raises(ValueError, match=r"one value per step \(5\)"):
        dit([1], num_inference_steps=3)


def test_pipelines_with_one_transformer_keep_their_budgets(stock: Any, chunked: Any) -> None:
    pipes = [other(stock, chunked) for _ in range(2)]
    for pipe, drop in zip(pipes, (0.0, 0.95), strict=True):
        fastgen.enable_dc(pipe, tail_drop=drop)
    alone = [draw(pipe) for pipe in pipes]
    assert not np.array_equal(*alone)
    assert np.array_equal(draw(pipes[0]), alone[0])  # alternately

    def nested(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        assert np.array_equal(draw(pipes[1]), alone[1])
        return {}

    assert np.array_equal(draw(pipes[0], callback_on_step_end=nested), alone[0])
    found: list[Any] = [None, None]
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        meet = lambda *_: barrier.wait(60) and {} or {}  # noqa: E731 - both threads go step by step
        found[index] = draw(pipes[index], callback_on_step_end=meet)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(one, two) for one, two in zip(found, alone, strict=True))


@pytest.mark.parametrize(("images", "prompts", "scale"), [(3, 2, 2.0), (2, 1, 2.0), (4, 2, 2.0), (1, 3, 0.0)])
def test_images_that_contradict_the_batch_are_refused(
    stock: Any, chunked: Any, images: int, prompts: int, scale: float
) -> None:
    fastgen.enable_dc(stock, chunked, uncond_tail_drop=0.9, images=images)
    with pytest.raises(ValueError, match=f"images: {images} "):
        draw(stock, prompt=["a red circle"] * prompts, guidance_scale=scale)
    draw(stock, prompt=["a red circle"] * images, guidance_scale=scale)


def test_copies_come_back_enabled(stock: Any, chunked: Any) -> None:
    original = stock.transformer
    fastgen.enable_dc(stock, chunked, tail_drop=late)
    pickled = pickle.dumps(stock)  # once it has been used, transformers keeps functions in text encoders
    expected, plain = draw(stock), draw(other(stock, original))
    for twin in (copy.deepcopy(stock), pickle.loads(pickled)):
        assert np.array_equal(draw(twin), expected)
        fastgen.disable_dc(twin)
        assert type(twin) is ZImagePipeline and np.array_equal(draw(twin), plain)
    assert np.array_equal(draw(stock), expected)
    fastgen.disable_dc(stock)
    assert stock.transformer is original and type(stock) is ZImagePipeline


def test_from_pipe_says_what_to_do(stock: Any, chunked: Any) -> None:
    ours = other(stock, chunked, DCZImagePipeline)
    fastgen.enable_dc(stock, chunked)
    for pipe in (stock, ours):
        with pytest.raises(ValueError, match="from_pipe: does not take a transformer with dynamic chunking by itself"):
            ZImageImg2ImgPipeline.from_pipe(pipe)
        assert ZImageImg2ImgPipeline.from_pipe(pipe, transformer=pipe.transformer).transformer is chunked


WRONG: list[tuple[str, dict[str, Any]]] = [
    *(
        ("tail_drop", {"tail_drop": value})
        for value in ("0.3", float("nan"), True, None, 1, -0.1, [0.1, "x"], object())
    ),
    ("tail_drop", {"tail_drop": [0.1, float("nan"), 0.1, 0.1]}),
    *(("uncond_tail_drop", {"uncond_tail_drop": value, "images": 1}) for value in ("0.3", float("inf"), [2.0], True)),
    *(("token_budget", {"token_budget": value}) for value in (1.5, True, 0, -1, "5", [5], float("nan"))),
    *(("images", {"images": value}) for value in (0, 1.5, True, "2")),
]


@pytest.mark.parametrize(("name", "knobs"), WRONG, ids=lambda value: repr(value)[:40].partition(" at 0x")[0])
def test_wrong_knobs_are_refused_immediately(stock: Any, chunked: Any, name: str, knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        fastgen.enable_dc(stock, chunked, **knobs)
    assert type(stock) is ZImagePipeline and stock.transformer is not chunked
    if name != "images":
        given = {key: value for key, value in knobs.items() if key != "images"}
        ours = other(stock, chunked, DCZImagePipeline)
        ours.text_encoder = None  # nothing has run yet
        with pytest.raises(ValueError, match=f"^{name}: "):
            draw(ours, **given)


@pytest.mark.parametrize("value", ["0.3", None, 2.0, float("nan"), [0.1]])
def test_functions_that_return_rubbish_are_refused(stock: Any, chunked: Any, value: Any) -> None:
    fastgen.enable_dc(stock, chunked, tail_drop=lambda step, sigma: value)
    with pytest.raises(ValueError, match="^tail_drop"):
        draw(stock)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("output_chunks", {"output_chunks": 5}),
        ("generator", {"generator": 5}),
        ("height", {"height": -16}),
        ("num_inference_steps", {"num_inference_steps": 2.5}),
        ("num_images_per_prompt", {"num_images_per_prompt": "2"}),
        ("guidance_scale", {"guidance_scale": float("nan")}),
        ("callback_on_step_end", {"callback_on_step_end": 5}),
        ("token_budget", {"token_budget": 17}),
    ],
)
def test_wrong_arguments_of_our_pipelines_are_named(
    stock: Any, chunked: Any, name: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        draw(other(stock, chunked, DCZImagePipeline), **arguments)


def test_what_cannot_be_enabled_is_refused(stock: Any, chunked: Any) -> None:
    with pytest.raises(ValueError, match="^pipe: int is not"):
        fastgen.enable_dc(5, chunked)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^pipe: DCZImagePipeline takes tail_drop"):
        fastgen.enable_dc(other(stock, chunked, DCZImagePipeline), tail_drop=0.3)
    with pytest.raises(ValueError, match="takes the place of DiTTransformer2DModel, not of ZImage"):
        fastgen.enable_dc(stock, micro_dc_dit().transformer)
    fastgen.enable_dc(stock, chunked)
    stock.transformer = upcycle  # anything without dynamic chunking
    with pytest.raises(ValueError, match="has no dynamic chunking"):
        draw(stock)
