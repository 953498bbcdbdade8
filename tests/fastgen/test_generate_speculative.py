"""`fastgen generate --method speculative`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from micro_models import JANUS_TOKENS
from PIL import Image

from fastgen.cli.main import run


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(["generate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_greedy_pictures_are_the_plain_ones_in_fewer_passes(
    micro_janus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["a red circle", "--model", micro_janus, "--temperature", 0, "--json"]
    code, out, err = call(capsys, *common, "-o", tmp_path / "plain.png")
    assert code == 0, err
    assert json.loads(out)["stats"]["passes"] == {"target": JANUS_TOKENS}
    code, out, err = call(capsys, *common, "--method", "speculative", "-o", tmp_path / "fast.png")
    assert code == 0, err
    result = json.loads(out)
    assert result["settings"]["method"] == "speculative" and result["stats"]["passes"]["target"] < JANUS_TOKENS
    assert sum(result["stats"]["accepted_lengths"]) > 0
    plain, fast = (np.asarray(Image.open(tmp_path / name)) for name in ("plain.png", "fast.png"))
    assert (plain == fast).all()


@pytest.mark.parametrize(
    ("knobs", "loss"),
    [([], "distribution"), (["--acceptance", "lantern", "--tree", "jacobi-3"], "lossy")],
)
def test_knobs_reach_the_sidecar(
    micro_janus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], knobs: list[str], loss: str
) -> None:
    options = ["a ring", "--model", micro_janus, "--method", "speculative", "-o", tmp_path / "a.png", *knobs]
    code, _, err = call(capsys, *options)
    assert code == 0, err
    sidecar = json.loads((tmp_path / "a.json").read_text())
    assert sidecar["loss"] == loss
    assert sidecar["settings"]["acceptance"] == (knobs[1] if knobs else None)
    assert sidecar["stats"]["paths"]["draft"] == {"JacobiSource": None}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (["--method", "speculative", "--acceptance", "loose"], "--acceptance: 'loose' is not allowed"),
        (["--method", "speculative", "--tree", "jacobi-0"], "--tree: 'jacobi-0' is not allowed"),
        (["--method", "speculative", "--tree", "chain-4"], "--tree: 'chain-4' needs a drafter"),
        (["--method", "speculative", "--model", "tiny"], "method speculative: model 'tiny' does not draw tokens"),
        (["--method", "faster"], "--method: 'faster' is not allowed"),
        (["--tree", "jacobi-4"], "tree: JanusImagePipeline does not take it"),
        (["--method", "speculative", "--steps", "4"], "steps: SpeculativeImagePipeline does not take it"),
    ],
)
def test_bad_knobs_end_in_one_line(
    micro_janus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], knobs: list[str], message: str
) -> None:
    model = [] if "--model" in knobs else ["--model", micro_janus]
    code, out, err = call(capsys, "a ring", *model, "-o", tmp_path / "x.png", *knobs)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not list(tmp_path.iterdir())
