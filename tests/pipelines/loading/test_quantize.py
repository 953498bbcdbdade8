"""Weights of the denoiser in fewer bits while a model is loaded."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from generate_command import call
from torch import nn

from fastgen.errors import FastgenError
from fastgen.pipelines import quantization
from fastgen.pipelines.generation import generate_images
from fastgen.pipelines.loading import load_pipeline, loader
from fastgen.pipelines.loading.checkpoint import embedded_folder, find_checkpoint
from fastgen.pipelines.loading.memory import check_memory, weight_sizes
from fastgen.pipelines.loading.networks import empty_network

CPU = torch.device("cpu")


def test_without_the_library_the_line_names_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else found(name))
    monkeypatch.setattr(loader, "load_network", lambda *given: pytest.fail("weights are read"))
    code, _, err = call(capsys, "a ring", "--quantize", "int8")
    assert code == 2 and err.count("\n") == 1
    line = "quantize: int8 cannot be used: torchao is not installed (python -m pip install torchao)"
    assert err.strip() == f"error: {line}"


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("tiny", "int3", "quantize: 'int3' is not allowed, needs one of int8, int8-dynamic, fp8, int4"),
        ("tiny", 8, "quantize: 8 is not allowed"),
        ("tiny-janus", "int8", "quantize: JanusImagePipeline has no denoiser"),
        ("tiny", "int4", "quantize: int4 cannot be used: "),
        ("tiny", "fp8", "quantize: fp8 cannot be used: "),
    ],
)
def test_what_cannot_be_is_refused_before_weights_load(
    model: str, kind: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "load_network", lambda *given: pytest.fail("weights are read"))
    with pytest.raises(FastgenError, match=message):
        load_pipeline(model, quantize=kind)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_memory_check_counts_the_smaller_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import ZImageTransformer2DModel

    checkpoint = find_checkpoint("tiny")
    network = empty_network(ZImageTransformer2DModel, embedded_folder("tiny") / "transformer")
    sensitive = ("t_embedder", "cap_embedder", "x_embedder", "final_layer")
    linear = [
        layer.weight
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and not any(part in name for part in sensitive)
    ]
    whole, smaller = weight_sizes(checkpoint, torch.float32), weight_sizes(checkpoint, torch.float32, kind)
    saved = sum(w.numel() * (32 - quantization.BITS[kind]) // 8 - 4 * len(w) for w in linear)
    assert whole["transformer"] - smaller["transformer"] == saved > whole["transformer"] // 2
    assert {name: size for name, size in whole.items() if smaller[name] != size}.keys() == {"transformer"}
    between = (sum(whole.values()) + sum(smaller.values())) // 2
    monkeypatch.setattr("fastgen.pipelines.loading.memory.free_memory", lambda device: between)
    check_memory("tiny", smaller, CPU, "none", torch.float32)
    with pytest.raises(FastgenError, match="does not fit"):
        check_memory("tiny", whole, CPU, "none", torch.float32)


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic"])
def test_loaded_smaller_is_made_smaller_later(kind: str) -> None:
    pytest.importorskip("torchao")
    from fastgen.pipelines.accelerate.quantize import Quantize

    pipe, later = load_pipeline("tiny", quantize=kind), load_pipeline("tiny")
    Quantize(kind).enable(later)

    def small(each: Any) -> set[str]:
        return {name for name, weight in each.named_parameters() if type(weight.data) is not torch.Tensor}

    assert small(pipe.transformer) == small(later.transformer) != set()

    def picture(each: Any) -> Any:
        return next(generate_images(each, ["a red circle"], [0], steps=2))

    assert picture(pipe).image.tobytes() == picture(later).image.tobytes()
    assert picture(pipe).loss == "lossy"


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic"])
def test_the_sizes_are_those_of_the_loaded_weights(kind: str) -> None:
    pytest.importorskip("torchao")
    pipe: Any = load_pipeline("tiny", quantize=kind)

    def size(weight: Any) -> int:
        if type(weight) is torch.Tensor:
            return int(weight.nbytes)
        return sum(getattr(weight, part).nbytes for part in weight.__tensor_flatten__()[0])

    held = sum(size(weight.data) for weight in pipe.transformer.parameters())
    counted = weight_sizes(find_checkpoint("tiny"), torch.float32, kind)["transformer"]
    assert abs(held - counted) < 0.01 * held
