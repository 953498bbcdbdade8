"""Weights divided between two processes (FSDP2 over gloo): the same training, killed or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_sharded import LIMIT, clipped_step
from PIL import Image
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from train_sharded import SIZE, settings_of, train

from fastgen.data.shapes import ShapesWorld
from fastgen.errors import FastgenError

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "helpers" / "train_sharded.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
]  # without a GPU: two on the CPU
RECIPES = ["dc-graft", "dc-finetune", "dc-patch"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty renders with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    drawn = ShapesWorld(5).batch(40, 0)
    for index, (image, text) in enumerate(zip(drawn.images, drawn.texts, strict=True)):
        Image.fromarray(np.asarray(image)).resize((SIZE, SIZE)).save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(text)
    return folder


def launch(output: Path, model: Path, pictures: Path, launcher: list[str] = TORCHRUN, **options: Any) -> Any:
    command = [sys.executable, *launcher, str(SCRIPT), str(output), str(model), str(pictures), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def state(folder: Path, step: int = 3) -> dict[str, Any]:
    """Trained weights, averages and optimizer state after a step, whole."""
    if not (parts := folder / f"checkpoint-{step}").is_dir():
        return dict(torch.load(folder / "checkpoint.pt", weights_only=True))
    assert [path.name for path in folder.glob("checkpoint-*")] == [parts.name]
    dcp_to_torch_save(parts, folder / "whole.pt")
    return dict(torch.load(folder / "whole.pt", weights_only=True))


@pytest.fixture(scope="module")
def together(micro_z: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All recipes, two processes, 16 items a step each."""
    output = tmp_path_factory.mktemp("together")
    done = launch(output, micro_z, pictures, recipes=RECIPES, batch_size=16)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train_as_one_with_twice_the_batch(
    name: str, together: Path, micro_z: Path, pictures: Path, tmp_path: Path
) -> None:
    if name == "dc-finetune":
        (tmp_path / "dc-graft").symlink_to(together / "dc-graft")
    begin = settings_of(name, tmp_path, micro_z, pictures).build().build().state_dict()
    train(name, tmp_path, micro_z, pictures, batch_size=32)
    steps = [torch.load(folder / name / "checkpoint.pt", weights_only=True)["step"] for folder in (tmp_path, together)]
    assert steps == [3, 3]  # a signal would have ended one early
    ours, theirs = state(tmp_path / name)["module"], state(together / name)["module"]
    apart, moved = (
        sum(float((value - other[key]).square().sum()) for key, value in theirs.items()) for other in (ours, begin)
    )
    assert moved > 0 and apart < 1e-4 * moved  # AdamW's first steps are signs of gradients, some of which are rounding


def test_killed_and_resumed_training_ends_with_the_same_bits(
    together: Path, micro_z: Path, pictures: Path, tmp_path: Path
) -> None:
    """Killed under torchrun, resumed under `accelerate launch`."""
    options = {"recipes": ["dc-patch"], "batch_size": 16}
    assert launch(tmp_path, micro_z, pictures, kill_at=2, **options).returncode != 0
    assert (tmp_path / "dc-patch" / "checkpoint-2").is_dir()
    with pytest.raises(FastgenError, match="processes is 2 there and 1 now"):
        train("dc-patch", tmp_path, micro_z, pictures, batch_size=16)
    done = launch(tmp_path, micro_z, pictures, ACCELERATE, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = (state(folder / "dc-patch") for folder in (together, tmp_path))

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)

    assert {"module", "averages", "optimizers"} <= expected.keys() and same(expected, found)
    name = "model/transformer/diffusion_pytorch_model.safetensors"
    assert (together / "dc-patch" / name).read_bytes() == (tmp_path / "dc-patch" / name).read_bytes()


def test_bfloat16_and_recomputed_activations(micro_z: Path, pictures: Path, tmp_path: Path) -> None:
    options = {"precision": "bf16", "gradient_checkpointing": True, "batch_size": 16, "accumulate": 2, "steps": 1}
    done = launch(tmp_path, micro_z, pictures, recipes=["dc-graft", "dc-patch"], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("dc-graft", "dc-patch"):
        found = state(tmp_path / name, 1)
        assert {value.dtype for value in found["module"].values()} == {torch.float32}
        assert all(bool(value.isfinite().all()) for value in found["module"].values())
        assert json.loads((tmp_path / name / "model/training.json").read_text())[name]["processes"] == 2


def test_gradients_in_parts_are_clipped_by_their_norm_over_all_processes(tmp_path: Path) -> None:
    """With plain SGD: AdamW would not see the scale of a gradient."""
    file = tmp_path / "step.pt"
    command = [sys.executable, *TORCHRUN, str(SCRIPT.with_name("clip_sharded.py")), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = torch.load(file, weights_only=True), clipped_step()
    assert expected["norm"] > 2 * LIMIT  # the clip is active
    assert found["norms"] == pytest.approx([expected["norm"]] * 2, rel=1e-9)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-9, atol=1e-9)
