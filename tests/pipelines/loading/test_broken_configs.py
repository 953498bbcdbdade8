"""Hostile values in the files of a model, each refused in one line before its networks are built."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from broken_folders import HOSTILE

from fastgen.drafters.loading import load_drafter
from fastgen.errors import FastgenError
from fastgen.pipelines.generation import explained_drawing
from fastgen.pipelines.loading.checkpoint import check_numbers, embedded_folder, find_checkpoint
from fastgen.pipelines.loading.weight_files import check_safetensors
from fastgen.pipelines.search.calibration import Calibration


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**6),
        ("n_layers", -(10**9)),
        ("hidden_size", 10**9),
        ("num_train_timesteps", 10**9),
        ("block_out_channels", [8, 10**9]),
        ("anything", 10**30),
        ("rope_theta", float("inf")),
        ("scaling_factor", float("nan")),
    ],
)
def test_a_number_that_nothing_can_be_built_of_is_refused(key: str, value: Any) -> None:
    with pytest.raises(FastgenError, match=f"config.json: {key} is"):
        check_numbers({"outer": [{key: value}]}, Path("config.json"))


def test_numbers_of_published_models_pass() -> None:
    config = {"rope_theta": 10**11, "vocab_size": 256_000, "max_position_embeddings": 10_485_760}
    check_numbers(config | {"num_hidden_layers": 126, "trained_betas": [0.1] * 1000}, Path("config.json"))
    check_numbers({"lambda_min_clipped": float("-inf")}, Path("scheduler_config.json"))
    with pytest.raises(FastgenError, match="layer_types has 5000 values"):
        check_numbers({"layer_types": ["x"] * 5000}, Path("config.json"))


@pytest.mark.parametrize("entry", [[1, "UNet2DConditionModel"], ["diffusers", 10**30], [[], {}], ["diffusers", True]])
def test_a_component_of_a_wrong_type_is_refused(tmp_path: Path, entry: list[Any]) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "ZImagePipeline", "transformer": entry}))
    with pytest.raises(FastgenError, match="transformer must name a library and a class"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "X", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": None, "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F16", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        [],
        None,
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, entry: Any) -> None:
    header = json.dumps({"weight": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(FastgenError, match="is truncated or corrupt: "):
        check_safetensors(tmp_path / "model.safetensors")


def test_a_drafter_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(embedded_folder("tiny-janus") / "drafter", tmp_path / "drafter")
    file = tmp_path / "drafter" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    file.unlink()
    del weights["read.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(FastgenError, match=r"1 missing weights, e\.g\. 'read.weight'"):
        load_drafter(tmp_path / "drafter")


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: str(value)[:12].replace("\0", ""))
@pytest.mark.parametrize("key", ["signature", "config", "evaluations", "price", "taus", "times", "quantiles", "fixed"])
def test_a_broken_file_of_thresholds_is_refused_or_of_use(tmp_path: Path, key: str, value: Any) -> None:
    data = json.loads((embedded_folder("shapes-verifier") / "thresholds" / "tiny.json").read_text(encoding="utf-8"))
    holder = {"config": data["signature"], **dict.fromkeys(("evaluations", "price", "taus"), data["schedules"][0])}
    holder.get(key, data)[key] = value
    (tmp_path / "thresholds.json").write_text(json.dumps(data), encoding="utf-8")
    try:
        found = Calibration.load(tmp_path)
    except FastgenError:
        return
    found.fits(object())
    found.threshold([0.9, 0.5], 20.0)


def test_an_error_of_a_users_model_is_one_line_and_a_bug_of_ours_is_not(tmp_path: Path) -> None:
    shutil.copytree(embedded_folder("tiny-janus"), tmp_path / "model")
    users = find_checkpoint(tmp_path / "model")
    with pytest.raises(FastgenError, match="cannot draw: RuntimeError: shapes differ"), explained_drawing(users):
        raise RuntimeError("shapes\ndiffer")
    with pytest.raises(RuntimeError, match="shapes"), explained_drawing(find_checkpoint("tiny")):
        raise RuntimeError("shapes\ndiffer")


def test_every_command_explains_a_users_model_that_cannot_draw(
    micro_z: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastgen.cli import main
    from fastgen.pipelines.loading import load_pipeline

    def fail(*args: Any, **kwargs: Any) -> None:
        pipe = load_pipeline(model)
        assert pipe is not None
        raise RuntimeError("shapes\ndiffer")

    monkeypatch.setattr(main.typer.main, "get_command", lambda app: fail)
    monkeypatch.setattr(fail, "main", fail, raising=False)
    model = str(micro_z)
    assert main.run(["bench", "search"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: model ") and "cannot draw: RuntimeError: shapes differ" in said
