"""`fastgen generate --method speculative`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from generate_command import call
from micro_models import JANUS_TOKENS
from PIL import Image

from fastgen.drafters.calibration import Calibration, Level
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.targets import target_of
from fastgen.pipelines.janus import JanusImagePipeline


@pytest.fixture(scope="module")
def with_drafter(micro_janus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro Janus with a drafter and its calibration in its folder."""
    model = Path(shutil.copytree(micro_janus, tmp_path_factory.mktemp("model") / "janus"))
    pipe = JanusImagePipeline.from_pretrained(model, torch_dtype=torch.float32)
    torch.manual_seed(0)
    EagleDrafter.for_target(target_of(pipe.model, pipe.tokenizer), heads=2).save_pretrained(model / "drafter")
    Calibration((Level(0.5, 0.1, 0.2, 2.0, 0.0, (9, 0, 0)),)).save(model / "drafter")
    defaults = json.loads(path.read_text()) if (path := model / "fastgen.json").exists() else {}
    path.write_text(json.dumps({**defaults, "drafter": "drafter"}))
    return model


def test_greedy_pictures_are_the_plain_ones_in_fewer_passes(
    micro_janus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["a red circle", "--model", micro_janus, "--temperature", 0, "--json"]
    code, out, err = call(capsys, *common, "-o", tmp_path / "plain.png")
    assert code == 0, err
    assert json.loads(out)["stats"]["passes"] == {"target": JANUS_TOKENS}
    code, out, err = call(
        capsys, *common, "--method", "speculative", "--tree", "jacobi-8", "-o", tmp_path / "fast.png"
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["settings"]["method"] == "speculative" and result["stats"]["passes"]["target"] < JANUS_TOKENS
    assert sum(result["stats"]["accepted_lengths"]) > 0
    plain, fast = (np.asarray(Image.open(tmp_path / name)) for name in ("plain.png", "fast.png"))
    assert (plain == fast).all()


@pytest.mark.parametrize(
    ("knobs", "loss"),
    [([], "distribution"), (["--acceptance", "lantern"], "lossy")],
)
def test_knobs_reach_the_sidecar(
    micro_janus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], knobs: list[str], loss: str
) -> None:
    options = ["a ring", "--model", micro_janus, "--method", "speculative", "-o", tmp_path / "a.png", *knobs]
    options += ["--tree", "jacobi-3x2-1"]
    code, _, err = call(capsys, *options)
    assert code == 0, err
    sidecar = json.loads((tmp_path / "a.json").read_text())
    assert sidecar["loss"] == loss
    assert sidecar["settings"]["acceptance"] == (knobs[1] if knobs else None)
    assert sidecar["settings"]["tree"] == "jacobi-3x2-1"
    assert sidecar["stats"]["paths"]["draft"] == {"JacobiSource": None}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (["--method", "speculative", "--acceptance", "loose"], "--acceptance: 'loose' is not allowed"),
        (["--method", "speculative", "--tree", "jacobi-0"], "--tree: 'jacobi-0' is unknown"),
        (["--method", "speculative", "--tree", "chain-4"], "--tree: 'chain-4' needs a drafter"),
        (["--method", "speculative", "--model", "tiny"], "method speculative: model 'tiny' does not draw tokens"),
        (["--method", "faster"], "--method: 'faster' is not allowed"),
        (["--tree", "jacobi-4"], "tree: JanusImagePipeline does not take it"),
        (["--drafter", "none"], "--drafter: needs --method speculative"),
        (["--compile"], "--compile: needs --method speculative"),
        (["--method", "speculative", "--drafter", "/nowhere/at/all"], "there is no config.json"),
        (["--method", "speculative", "--quality", "2"], "--quality: 2.0 is not allowed"),
        (["--method", "speculative", "--quality", "0.5"], "quality: is a knob of acceptance cascade"),
        (["--method", "speculative", "--acceptance", "cascade", "--quality", "1"], "--quality: needs a drafter"),
        (["--method", "speculative", "--tree", "jacobi-17"], "'jacobi-17' is longer than a picture of 16 tokens"),
        (["--method", "speculative", "--tree", "jacobi-4x2-5"], "candidates at 5 places, the window has 4"),
        (["--method", "speculative", "--acceptance", "gsd", "--tree", "plain"], "'plain' drafts nothing"),
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


def test_the_models_own_drafter(with_drafter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is taken without being named, and its calibration with it; another one and none can be asked for."""
    common = ["a red circle", "--model", with_drafter, "--method", "speculative", "--json"]
    code, out, err = call(
        capsys, *common, "--acceptance", "cascade", "--quality", 0.5, "--tree", "2-1", "-o", tmp_path / "a.png"
    )
    assert code == 0, err
    own = json.loads(out)
    assert own["settings"]["drafter"] == "own" and own["settings"]["quality"] == 0.5
    assert own["stats"]["passes"]["drafter"] > 0 and own["stats"]["paths"]["draft"] == {"TreeSource": None}
    code, out, err = call(
        capsys, *common, "--drafter", with_drafter / "drafter", "--tree", "2-1", "-o", tmp_path / "b.png"
    )
    assert code == 0, err
    named = json.loads(out)
    # Its files are the model's own: other ones would give another digest.
    assert named["settings"]["weights"] == own["settings"]["weights"] and named["stats"]["passes"]["drafter"] > 0
    code, out, err = call(capsys, *common, "--drafter", "none", "-o", tmp_path / "c.png")
    assert code == 0, err
    assert "drafter" not in json.loads(out)["stats"]["passes"]


def test_a_calibration_of_another_model_is_refused_first(
    with_drafter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(with_drafter, tmp_path / "model"))
    Calibration((), {"target": {"vocab_size": 7}}).save(model / "drafter")
    code, _, err = call(capsys, "a ring", "--model", model, "--method", "speculative", "-o", tmp_path / "x.png")
    assert code == 2 and "made for a model of vocab_size 7" in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "x.png").exists()


def test_a_broken_drafter_is_refused_first(
    with_drafter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(with_drafter, tmp_path / "model"))
    weights = next((model / "drafter").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    code, _, err = call(
        capsys, "a ring", "--model", model, "--method", "speculative", "-o", tmp_path / "out" / "x.png"
    )
    assert code == 2 and "truncated" in err and len(err.strip().splitlines()) == 1
    assert call(capsys, "a ring", "--model", model, "-o", tmp_path / "plain.png")[0] == 0  # it needs none
    shutil.rmtree(model / "drafter")
    code, _, err = call(capsys, "a ring", "--model", model, "-o", tmp_path / "y.png")
    assert code == 2 and "drafter" in err


@pytest.mark.parametrize("part", ["drafter", "heads"])
@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "target_layers"])
def test_parts_of_another_model_are_refused_before_weights_load(
    with_drafter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    name: str,
) -> None:
    model = Path(shutil.copytree(with_drafter, tmp_path / "model"))
    folder = model / "drafter"
    if part == "heads":
        folder = folder / "heads"
        shutil.copytree(model / "drafter", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"_class_name": "WindowHeads"} if part == "heads" else {}
    (folder / "config.json").write_text(json.dumps({**config, name: config[name] + 1}))

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(JanusImagePipeline, "from_pretrained", never)
    code, _, err = call(capsys, "a ring", "--model", model, "--method", "speculative", "-o", tmp_path / "x.png")
    assert code == 2 and f"{part} " in err and f"made for a model of {name}" in err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "x.png").exists()
