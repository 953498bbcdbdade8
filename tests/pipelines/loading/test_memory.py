"""Sizes of models by the headers of their files, and what does not fit into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.pipelines.loading import load_pipeline, loader, memory
from fastgen.pipelines.loading.checkpoint import EMBEDDED_MODELS, find_checkpoint
from fastgen.pipelines.loading.memory import check_memory, free_memory, weight_sizes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIGABYTE = 10**9


@pytest.mark.parametrize("model", EMBEDDED_MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_are_those_of_the_loaded_networks(model: str, dtype: str) -> None:
    pipe = load_pipeline(model, dtype=dtype)
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    held = {
        name: sum(each.numel() * each.element_size() for each in net.parameters()) for name, net in networks.items()
    }
    sizes = weight_sizes(find_checkpoint(model), getattr(torch, dtype))
    assert sizes.keys() == held.keys()
    assert all(sizes[name] == pytest.approx(size, rel=0.01) for name, size in held.items())


def test_a_model_larger_than_memory_ends_before_its_weights_are_read(
    micro_z: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    monkeypatch.setattr(loader, "load_network", lambda *given: pytest.fail("weights are read"))
    assert run(["generate", "x", "--model", str(micro_z), "-o", str(tmp_path / "a.png")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "MB of weights in float32, and 0.0 MB of main memory are free; --dtype bfloat16" in err


@pytest.mark.parametrize(
    ("offload", "device", "on_gpu", "in_main", "message"),
    [
        ("none", CUDA, 39, 99, "40.0 GB of weights in bfloat16, and 39.0 GB of cuda are free"),
        ("none", CUDA, 99, 29, "30.0 GB of weights in bfloat16, and 29.0 GB of main memory"),
        ("model", CUDA, 29, 99, "30.0 GB of weights in bfloat16, and 29.0 GB of cuda are free"),
        ("group", CUDA, 1, 39, "40.0 GB of weights in bfloat16, and 39.0 GB of main memory"),
        ("none", CPU, 1, 39, "40.0 GB of weights in bfloat16, and 39.0 GB of main memory"),
        ("none", CUDA, 40, 30, None),
        ("model", CUDA, 30, 40, None),
        ("sequential", CUDA, 1, 40, None),
        ("none", CPU, 1, 40, None),
    ],
)
def test_every_way_needs_its_memory(
    offload: str, device: torch.device, on_gpu: int, in_main: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda where: GIGABYTE * (on_gpu if where.type == "cuda" else in_main))
    sizes = {"transformer": 30 * GIGABYTE, "text_encoder": 10 * GIGABYTE}

    def check() -> None:
        check_memory("large", sizes, device, offload, torch.bfloat16)

    if message is None:
        check()
    else:
        with pytest.raises(FastgenError) as caught:
            check()
        assert message in str(caught.value)


def test_a_container_limits_main_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = free_memory(CPU)
    assert unlimited is not None and unlimited > 0
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.max").write_text("4000\n")
    assert free_memory(CPU) == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) not in (None, 1000)
    assert free_memory(torch.device("mps")) is None


def test_networks_go_straight_to_their_device(micro_z: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[torch.device] = []
    stock: Any = loader.load_network

    def load(*given: Any) -> Any:
        placed.append(given[4])
        return stock(*given)

    monkeypatch.setattr(loader, "load_network", load)
    load_pipeline(str(micro_z))
    assert placed == [CPU] * 3
    network = stock(*_vae(micro_z), torch.device("meta"))
    assert next(network.parameters()).device.type == "meta"


def _vae(folder: Path) -> tuple[Any, Path, torch.dtype, None]:
    return AutoencoderKL, folder / "vae", torch.float32, None
