"""`fastgen generate` with dynamic chunking."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from generate_command import call
from PIL import Image


def test_budget_reaches_the_model_and_the_sidecar(
    micro_dc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["a red circle", "--model", micro_dc, "--token-budget", 3, "--save-map", "--json"]
    code, out, err = call(capsys, *options, "-o", tmp_path / "a.png")
    assert code == 0, err
    result = json.loads(out)
    assert result["settings"]["method"] == "dc" and result["settings"]["token_budget"] == 3
    assert result["stats"]["kept_tokens"] == [6, 6] and result["stats"]["total_tokens"] == [32, 32]
    assert json.loads((tmp_path / "a.json").read_text())["loss"] == "lossy"
    with Image.open(tmp_path / "a.map.png") as sheet:
        assert sheet.width > 2 * 64 and sheet.mode == "RGB"
    call(capsys, "a red circle", "--model", micro_dc, "-o", tmp_path / "b.png")
    full, few = (np.asarray(Image.open(tmp_path / name)) for name in ("b.png", "a.png"))
    assert full.shape == few.shape and (full != few).any()


def test_lite_cfg_takes_fewer_flops(micro_dc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flops = []
    for name, knobs in (("full", []), ("lite", ["--uncond-tail-drop", 0.9]), ("less", ["--tail-drop", 0.9])):
        code, out, err = call(capsys, "a ring", "--model", micro_dc, "-o", tmp_path / f"{name}.png", "--json", *knobs)
        assert code == 0, err
        flops.append(json.loads(out)["stats"]["flops"])
    assert flops[0] > flops[1] > flops[2]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (["--tail-drop", "1"], "--tail-drop: 1.0 is not allowed"),
        (["--tail-drop", "-0.1"], "--tail-drop: -0.1 is not allowed"),
        (["--uncond-tail-drop", "nan"], "--uncond-tail-drop: nan is not allowed"),
        (["--token-budget", "0"], "--token-budget: 0 is not allowed"),
        (["--token-budget", "3", "--tail-drop", "0.1"], "token_budget: cannot be used together"),
        (["--token-budget", "17"], "token_budget: 17 is not allowed, needs an integer from 1 to 16"),
    ],
)
def test_bad_knobs_end_in_one_line(
    micro_dc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], knobs: list[str], message: str
) -> None:
    code, out, err = call(capsys, "a ring", "--model", micro_dc, "-o", tmp_path / "x.png", *knobs)
    assert code == 2 and out == "" and message in err and err.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_knobs_of_dynamic_chunking_need_a_model_with_it(
    micro_z: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for knobs in (["--tail-drop", "0.3"], ["--token-budget", "3"], ["--save-map"]):
        code, _, err = call(capsys, "a ring", "--model", micro_z, "-o", tmp_path / "x.png", *knobs)
        assert code == 2 and ("does not take it" in err or "no dynamic chunking" in err)


def test_method_chooses_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["a red circle left of a blue square", "--steps", 4, "--json", "-o"]
    knobs = ["--method", "dc", "--tail-drop", 0.3, "--uncond-tail-drop", 0.9]
    code, out, err = call(capsys, *common, tmp_path / "dc.png", *knobs)
    assert code == 0, err
    result = json.loads(out)
    assert result["settings"]["model"] == "small-dc" and result["settings"]["method"] == "dc"
    assert len(result["stats"]["kept_tokens"]) == 4
    assert all(0 < kept < total / 2 for kept, total in zip(*(result["stats"][k] for k in KEPT), strict=True))
    code, out, err = call(capsys, *common, tmp_path / "budget.png", "--method", "dc", "--token-budget", 64)
    assert code == 0, err
    assert json.loads(out)["stats"]["kept_tokens"] == [128] * 4  # both branches of guidance
    code, out, err = call(capsys, *common, tmp_path / "base.png", "--method", "base")
    assert code == 0, err
    assert json.loads(out)["settings"]["model"] == "tiny"


KEPT = ("kept_tokens", "total_tokens")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "dcc"], "--method: 'dcc' is not allowed, needs one of base, dc"),
        (["--method", "dc", "--model", "tiny"], "model 'tiny' has no dynamic chunking"),
        (["--method", "base", "--model", "small-dc"], "model 'small-dc' has dynamic chunking"),
    ],
)
def test_methods_that_do_not_fit_the_model(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "a ring", "-o", tmp_path / "x.png", *options)
    assert code == 2 and out == "" and message in err and err.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([], ([0.0, 0.9], 0.5)),
        (["--steps", 4], ([0.0, 0.0, 0.9, 0.9], 0.5)),  # the same shares of the way
        (["--steps", 1], ([0.9], 0.5)),
        (["--tail-drop", 0.25], (0.25, None)),  # what the user asks for takes the place of all of it
        (["--token-budget", 16], (None, None)),
    ],
)
def test_a_model_brings_a_budget_by_step(
    asked: list[object],
    expected: tuple[object, object],
    micro_dc: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(micro_dc, folder)
    defaults = json.loads((folder / "fastgen.json").read_text())
    assert defaults["steps"] == 2
    budget = {"tail_drop": [0.0, 0.9], "uncond_tail_drop": 0.5}
    (folder / "fastgen.json").write_text(json.dumps({**defaults, **budget}))
    code, out, err = call(capsys, "a ring", "--model", folder, "-o", tmp_path / "a.png", "--json", *asked)
    assert code == 0, err
    settings = json.loads(out)["settings"]
    assert (settings.get("tail_drop"), settings.get("uncond_tail_drop")) == expected
