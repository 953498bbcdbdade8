"""Pipelines that have drawn are copied, pickled and sent to other processes, and draw the same pictures there."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, ZImagePipeline
from micro_models import awake
from other_process import brightness, draw_pictures, drawn_elsewhere

import fastgen
from fastgen.drafters.eagle import EagleDrafter
from fastgen.models.upcycle import upcycle
from fastgen.pipelines.dc_z_image import DCZImagePipeline
from fastgen.pipelines.janus import JanusImagePipeline
from fastgen.pipelines.noise_search import NoiseSearchPipeline
from fastgen.pipelines.search.names import named_policy

CONTINUOUS = {"prompt": "a red circle", "height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}
TOKENS = {"prompt": "a red circle", "output_type": "np"}


@pytest.fixture(scope="module")
def folders(micro_z: Path, micro_dc: Path, micro_janus: Path) -> dict[str, Path]:
    return {"z": micro_z, "dc": micro_dc, "janus": micro_janus}


def enabled(folders: dict[str, Path]) -> Any:
    pipe = ZImagePipeline.from_pretrained(folders["z"], torch_dtype=torch.float32)
    fastgen.enable_dc(pipe, awake(upcycle(pipe.transformer)), tail_drop=0.3)
    return pipe


def chunked(folders: dict[str, Path]) -> Any:
    return DCZImagePipeline.from_pretrained(folders["dc"], torch_dtype=torch.float32)


def cached(folders: dict[str, Path]) -> Any:
    pipe = enabled(folders)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    return pipe


def with_kernels(folders: dict[str, Path]) -> Any:
    pipe = cached(folders)
    fastgen.enable_kernels(pipe)
    return pipe


def with_lora(folders: dict[str, Path]) -> Any:
    peft = pytest.importorskip("peft")
    pipe = chunked(folders)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    return pipe


def janus(folders: dict[str, Path]) -> Any:
    return JanusImagePipeline.from_pretrained(folders["janus"], torch_dtype=torch.float32)


def speculative(folders: dict[str, Path]) -> Any:
    plain = janus(folders)
    pipe = fastgen.SpeculativeImagePipeline(plain.model, plain.tokenizer)
    pipe.drafter = EagleDrafter.for_target(pipe.target, heads=2)
    return pipe


def search(build: Callable[[dict[str, Path]], Any]) -> Callable[[dict[str, Path]], Any]:
    return lambda folders: NoiseSearchPipeline(build(folders), brightness, named_policy("best-of-n", n=2))


def stock(folders: dict[str, Path]) -> Any:
    return ZImagePipeline.from_pretrained(folders["z"], torch_dtype=torch.float32)


CASES: dict[str, tuple[Callable[[dict[str, Path]], Any], dict[str, Any]]] = {
    "enable-dc": (enabled, CONTINUOUS),
    "dc": (chunked, CONTINUOUS),
    "step-cache": (cached, CONTINUOUS),
    "step-cache-and-kernels": (with_kernels, CONTINUOUS),
    "lora": (with_lora, CONTINUOUS),
    "janus": (janus, TOKENS),
    "speculative": (speculative, TOKENS),
    "search-stock": (search(stock), CONTINUOUS),
    "search-enable-dc": (search(enabled), CONTINUOUS),
    "search-dc": (search(chunked), CONTINUOUS),
}


def through_a_file(pipe: Any) -> Any:
    file = io.BytesIO()
    torch.save(pipe, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    """A pipeline that has drawn, its call, and the pictures."""
    build, call = CASES[request.param]
    torch.manual_seed(0)
    pipe = build(folders)
    pipe.set_progress_bar_config(disable=True)
    return pipe, call, draw_pictures(pipe, call)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe)), "save": through_a_file}


@pytest.mark.parametrize("way", WAYS)
def test_copies_draw_the_same_and_leave_the_original_alone(case: Any, way: str) -> None:
    pipe, call, expected = case
    twin = WAYS[way](pipe)
    assert type(twin) is type(pipe)
    assert np.array_equal(draw_pictures(twin, call), expected)
    assert np.array_equal(draw_pictures(pipe, call), expected)


def test_other_processes_draw_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    expected = {}
    for name, (build, call) in CASES.items():
        torch.manual_seed(0)
        pipe = build(folders)
        pipe.set_progress_bar_config(disable=True)
        expected[name] = draw_pictures(pipe, call)
        (tmp_path / name).write_bytes(pickle.dumps((pipe, call)))
    found = drawn_elsewhere(tmp_path)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not np.array_equal(found[name], expected[name])] == []
