"""Wrong types and values from Python: each is refused by name, before the model runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from micro_models import micro_dc_dit
from tiny_flows import tiny_sd3
from tiny_unets import ddim, tiny_sd, tiny_sdxl
from torch import Tensor

from fastgen.models.upcycle import upcycle
from fastgen.pipelines.dc_z_image import DCZImagePipeline
from fastgen.pipelines.generation import generate_images
from fastgen.pipelines.loading import load_pipeline
from fastgen.pipelines.noise_search import NoiseSearchPipeline
from fastgen.pipelines.search.names import named_policy
from fastgen.pipelines.search.starts import BestOfN
from fastgen.pipelines.search.thresholds import Fixed, OnlineQuantile, PreviousPlus, Scheduled

NAN, INF = math.nan, math.inf

SEARCH: list[dict[str, Any]] = [
    {"prompt": 5},
    {"prompt": None},
    {"prompt": []},
    {"prompt": ["a cat", 3]},
    {"prompt": {"a cat": 1}},
    {"height": "32"},
    {"height": -1},
    {"height": 33},
    {"height": 32.0},
    {"width": True},
    {"width": 0},
    {"num_inference_steps": "3"},
    {"num_inference_steps": 0},
    {"num_inference_steps": 2.5},
    {"num_inference_steps": 10**30},
    {"guidance_scale": NAN},
    {"guidance_scale": INF},
    {"guidance_scale": "7"},
    {"guidance_scale": [7.0, 2.0]},
    {"negative_prompt": 5},
    {"negative_prompt": ["red", "blue"]},
    {"negative_prompt": []},
    {"negative_prompt": [None]},
    {"colour": 1},
    {"pipeline_kwargs": 5},
    {"pipeline_kwargs": {1: 2}},
    {"pipeline_kwargs": {"height": 32}},
    {"pipeline_kwargs": {"max_nfe": 4}},
    {"generator": 5},
    {"generator": "cpu"},
    {"generator": [torch.Generator(), torch.Generator()]},
    {"generator": [5]},
    {"max_nfe": "6"},
    {"max_nfe": 6.5},
    {"max_nfe": NAN},
    {"max_nfe": 0},
    {"max_nfe": True},
    {"max_seconds": "1"},
    {"max_seconds": NAN},
    {"max_seconds": 0},
    {"target_score": NAN},
    {"target_score": "0.5"},
    {"sampler": 5},
    {"sampler": "magic"},
    {"sampler": None},
    {"preview": 5},
    {"preview": "small"},
    {"preview": None},
    {"batch_size": True},
    {"batch_size": 0},
    {"batch_size": 1.5},
    {"batch_size": "2"},
    {"output_type": "latent"},
    {"output_type": 5},
    {"return_dict": "no"},
    {"on_round": 5},
    {"num_images_per_prompt": 2},
    {"latents": torch.zeros(1, 4, 8, 8)},
    {"callback_on_step_end": print},
    {"sigmas": [1.0, 0.5]},
    {"timesteps": [500, 100]},
    {"eta": 1.0},
    {"guidance_rescale": "0.5"},
    {"guidance_rescale": NAN},
]
CHUNKED: list[dict[str, Any]] = [
    {"prompt": 5},
    {"prompt": []},
    {"prompt": ["a ring", 5]},
    {"prompt": None},
    {"prompt": "a ring", "prompt_embeds": [torch.zeros(4, 16)]},
    {"prompt": None, "prompt_embeds": 5},
    {"negative_prompt": ["red", "blue"]},
    {"negative_prompt": 5},
    {"height": "16"},
    {"height": -16},
    {"width": 16.0},
    {"num_inference_steps": 0},
    {"num_inference_steps": "2"},
    {"num_images_per_prompt": 0},
    {"num_images_per_prompt": "2"},
    {"guidance_scale": NAN},
    {"guidance_scale": "5"},
    {"guidance_scale": None},
    {"cfg_truncation": NAN},
    {"generator": 5},
    {"generator": [torch.Generator(), torch.Generator()]},
    {"sigmas": "1"},
    {"sigmas": [NAN]},
    {"latents": 5},
    {"output_type": "jpeg"},
    {"return_dict": 5},
    {"callback_on_step_end": 5},
    {"max_sequence_length": 0},
    {"joint_attention_kwargs": 5},
    {"output_chunks": "yes"},
]
DIT: list[dict[str, Any]] = [
    {"class_labels": 5},
    {"class_labels": []},
    {"class_labels": ["goldfish"]},
    {"class_labels": [1.5]},
    {"class_labels": [-1]},
    {"class_labels": [10**6]},
    {"guidance_scale": NAN},
    {"guidance_scale": "4"},
    {"generator": 5},
    {"num_inference_steps": -1},
    {"output_type": "latent"},
    {"return_dict": 0},
]
GENERATE: list[dict[str, Any]] = [
    {"prompts": "a cat"},
    {"prompts": 5},
    {"prompts": [5]},
    {"seeds": 0},
    {"seeds": [0, 1]},
    {"seeds": [0.5]},
    {"seeds": [-1]},
    {"batch_size": True},
    {"batch_size": "2"},
    {"batch_invariant": "yes"},
    {"flops": 1},
    {"callback": 5},
    {"record_steps": True},
    {"steps": "3"},
    {"guidance_scale": NAN},
    {"height": -1},
    {"negative_prompt": ["red"]},
    {"colour": 1},
]


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.float().mean(dim=(1, 2, 3)) / 255


def names(calls: list[dict[str, Any]]) -> list[str]:
    return [f"{list(call)[-1]}={list(call.values())[-1]!r}"[:40] for call in calls]


@pytest.fixture
def untouched(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Fails when the denoiser ran."""
    ran: list[int] = []

    def note(module: torch.nn.Module, given: Any) -> None:
        if any(part in type(module).__name__ for part in ("UNet2D", "Transformer2D")):
            ran.append(1)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    yield
    handle.remove()
    assert not ran


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny_sd(ddim())


@pytest.fixture(scope="module")
def z(micro_dc: Path) -> DCZImagePipeline:
    return DCZImagePipeline.from_pretrained(micro_dc, torch_dtype=torch.float32)


@pytest.mark.parametrize("wrong", SEARCH, ids=names(SEARCH))
def test_searches(sd: Any, wrong: dict[str, Any], untouched: None) -> None:
    call = {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 3, "max_nfe": 12, **wrong}
    with pytest.raises((ValueError, TypeError), match=list(wrong)[-1]):
        NoiseSearchPipeline(sd, brightness, BestOfN(n=2))(**call)


@pytest.mark.parametrize("scale", [NAN, INF, "7", True])
def test_searches_with_flow_models(scale: Any, untouched: None) -> None:
    search = NoiseSearchPipeline(tiny_sd3(), brightness, BestOfN(n=2))
    with pytest.raises((ValueError, TypeError), match="guidance_scale"):
        search("a cat", height=32, width=32, num_inference_steps=3, guidance_scale=scale)


@pytest.mark.parametrize("wrong", CHUNKED, ids=names(CHUNKED))
def test_z_image_with_dynamic_chunking(z: Any, wrong: dict[str, Any], untouched: None) -> None:
    with pytest.raises((ValueError, TypeError), match=list(wrong)[-1]):
        z(**{"prompt": "a ring", "height": 16, "width": 16, "num_inference_steps": 2, **wrong})


@pytest.mark.parametrize("wrong", DIT, ids=names(DIT))
def test_dit_with_dynamic_chunking(wrong: dict[str, Any], untouched: None) -> None:
    with pytest.raises((ValueError, TypeError), match=list(wrong)[-1]):
        micro_dc_dit()(**{"class_labels": [1], "num_inference_steps": 2, **wrong})


@pytest.mark.parametrize("wrong", GENERATE, ids=names(GENERATE))
def test_generate_images(sd: Any, wrong: dict[str, Any], untouched: None) -> None:
    call = {"prompts": ["a cat"], "seeds": [0], "height": 32, "width": 32, "steps": 2, **wrong}
    with pytest.raises((ValueError, TypeError), match=list(wrong)[-1].rstrip("s")):
        generate_images(sd, **call)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"policy": 5}, "policy"),
        ({"policy": "luck"}, "policy"),
        ({"verifier": None}, "verifier"),
        ({"verifier": 5}, "verifier"),
        ({"thresholds": 5, "policy": "threshold"}, "thresholds"),
        ({"thresholds": "nowhere.json", "policy": "threshold"}, "nowhere"),
        ({"thresholds": 5, "policy": "svdd"}, "thresholds"),
        ({"pipe": 5, "policy": None}, "pipe"),
        ({"pipe": None}, "pipe"),
    ],
)
def test_parts_of_a_search(sd: Any, arguments: dict[str, Any], word: str) -> None:
    with pytest.raises((ValueError, TypeError), match=word):
        NoiseSearchPipeline(**{"pipe": sd, "verifier": brightness, "policy": "best-of-n", **arguments})


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("threshold", "tau", "0.5"),
        ("threshold", "tau", NAN),
        ("threshold", "goal", "0.5"),
        ("threshold", "restarts", 5),
        ("threshold", "prospects", 5),
        ("threshold", "patience", 1.5),
        ("threshold", "init", 5),
        ("threshold", "wave", "2"),
        ("rbf", "quota", "3"),
        ("svdd", "candidates", NAN),
        ("code", "block", True),
        ("smc", "temperature", "1"),
        ("smc", "temperature", NAN),
        ("smc", "threshold", "1"),
        ("search-over-paths", "start", "0.1"),
        ("search-over-paths", "up", NAN),
        ("zero-order", "cosine", "0.9"),
        ("zero-order", "cosine", NAN),
        ("random", "rounds", 2.5),
        ("best-of-n", "n", "3"),
    ],
)
def test_settings_of_policies(name: str, setting: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=setting):
        named_policy(name, **{setting: value})


@pytest.mark.parametrize(
    ("rule", "arguments", "word"),
    [
        (Fixed, {"tau": "0.5"}, "tau"),
        (OnlineQuantile, {"q": "0.5"}, "q:"),
        (PreviousPlus, {"delta": None}, "delta"),
        (Scheduled, {"taus": 0.5, "times": 3}, "taus"),
        (Scheduled, {"taus": ("a",), "times": 3}, "taus"),
        (Scheduled, {"taus": (0.5,), "times": "3"}, "times"),
    ],
)
def test_thresholds(rule: Any, arguments: dict[str, Any], word: str) -> None:
    with pytest.raises((ValueError, TypeError), match=word):
        rule(**arguments)


@pytest.mark.parametrize("wrong", [{"target_size": (NAN, 1)}, {"original_size": ("3", "4")}, {"target_size": 5}])
def test_sizes_of_xl(wrong: dict[str, Any]) -> None:
    search = NoiseSearchPipeline(tiny_sdxl(ddim()), brightness, BestOfN(n=1))
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        search("a cat", num_inference_steps=2, **wrong)


NOT_A_NETWORK: list[Any] = [5, 5.5, "6", True, [], {}, b"x", object(), torch.zeros(2), lambda: 1, str]


@pytest.mark.parametrize("method", [None, "speculative"])
@pytest.mark.parametrize("wrong", NOT_A_NETWORK, ids=lambda value: type(value).__name__)
def test_what_is_no_network_does_not_take_a_network_s_place(method: str | None, wrong: Any, micro_janus: Path) -> None:
    pipe: Any = _janus(micro_janus, method)
    for name in ("model", *(("drafter", "heads") if method else ())):
        before = getattr(pipe, name)
        with pytest.raises(ValueError, match=f"{name}: needs a network"):
            setattr(pipe, name, wrong)
        with pytest.raises(ValueError, match=f"{name}: needs a network"):
            pipe.register_modules(**{name: wrong})
        assert getattr(pipe, name) is before


@cache
def _janus(folder: Path, method: str | None) -> Any:
    return load_pipeline(str(folder), method=method)


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": 5},
        {"model": None},
        {"model": torch.zeros(2)},
        {"floor": "6"},
        {"floor": NAN},
        {"floor": torch.tensor([1.0, 2.0])},
        {"grid": np.array([1, 2])},
        {"grid": 5},
        {"router": []},
        {"residual_gate": True},
        {"scaffold_dim": 10**30},
        {"scaffold_dim": 0},
        {"scaffold_blocks": -1},
        {"router_dim": 2.5},
        {"compression": 0.5},
        {"compression": 10**30},
        {"smoothing": -1},
        {"smoothing": INF},
        {"center_tap": 1},
        {"n_last_layers": "1"},
    ],
    ids=str,
)
def test_wrong_arguments_of_upcycle_are_named(wrong: dict[str, Any], micro_z: Path) -> None:
    (name,) = wrong
    given = {"model": _stock(micro_z).transformer, "grid": "patch", **wrong}
    with pytest.raises((ValueError, TypeError), match=f"{name}: "):
        upcycle(given.pop("model"), **given)


@cache
def _stock(folder: Path) -> Any:
    return load_pipeline(str(folder))


class Mistake(Exception):
    pass


def test_what_a_caller_s_function_raises_is_the_caller_s(micro_z: Path, micro_dc: Path) -> None:
    def fail(*args: Any) -> float:
        raise Mistake

    with pytest.raises(Mistake):
        list(generate_images(_stock(micro_z), ["a"], [0], steps=1, callback=fail))
    for name in ("tail_drop", "uncond_tail_drop"):
        with pytest.raises(Mistake):
            list(generate_images(_stock(micro_dc), ["a"], [0], steps=1, **{name: fail}))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"seeds": b"x"}, "seeds"),
        ({"prompts": b"x"}, "prompts"),
        ({"guidance_scale": 10**30}, "guidance_scale"),
        ({"batch_size": 10**30}, "batch_size"),
        ({"acceptance": np.array([1, 2])}, "acceptance"),
    ],
    ids=str,
)
def test_further_wrong_arguments_of_generate_images_are_named(wrong: Any, named: str, micro_z: Path) -> None:
    given = {"prompts": ["a"], "seeds": [0], **wrong}
    with pytest.raises(ValueError, match=f"{named}: "):
        generate_images(_stock(micro_z), **given)


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3), 3])
def test_integers_of_numpy_are_seeds(seed: Any, micro_z: Path) -> None:
    drawn = [next(generate_images(_stock(micro_z), ["a"], [each], steps=1)).image.tobytes() for each in (3, seed)]
    assert drawn[0] == drawn[1]
    (whole,) = generate_images(_stock(micro_z), ["a"], np.array([3]), steps=np.int64(1))
    assert whole.image.tobytes() == drawn[0]
