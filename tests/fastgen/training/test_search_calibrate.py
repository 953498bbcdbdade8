"""`fastgen train search-calibrate` from end to end on a micro model: prompts, trajectories, resuming, and its use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from long_tail import long_tail
from PIL import Image
from stock_families import family

from fastgen.cli.main import run
from fastgen.data.captions import TASKS, vocabulary
from fastgen.evaluation.shapesworld import shapes_prompts
from fastgen.evaluation.verifiers.names import load_verifier
from fastgen.models.shapes_verifier import ShapesVerifier
from fastgen.pipelines.loading import load_checkpoint, load_pipeline
from fastgen.pipelines.loading.checkpoint import find_checkpoint
from fastgen.pipelines.noise_search import NoiseSearchPipeline
from fastgen.pipelines.search.calibration import Calibration
from fastgen.pipelines.search.policies import Threshold
from fastgen.training.search_calibrate import (
    Branching,
    _settings,
    _trajectories,
    calibrate_search,
    calibration_captions,
)

COUNT = 40  # three chunks, the last one not full
ASKED: dict[str, Any] = {"trajectories": COUNT, "settings": {"branches": 2, "steps": 3}}


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("verifier")
    ShapesVerifier(vocabulary(), width=32, channels=16, depth=1, fusion_layers=1).save_pretrained(place)
    return f"shapes-verifier:{place}"


@pytest.fixture(scope="module")
def done(micro_z: Path, verifier: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration") / "run"
    calibrate_search(str(micro_z), verifier, folder, **ASKED)
    return folder


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / "trajectories").iterdir()) for row in json.loads(path.read_text())]


def test_captions_are_none_of_the_evaluation_set() -> None:
    found = calibration_captions(1200, seed=3)
    evaluated = {item.prompt for item in shapes_prompts()}
    assert len(evaluated) == 360 and not evaluated & {item.prompt for item in found}
    assert [item.tag for item in found[:12]] == [*TASKS, *TASKS]
    assert calibration_captions(7, seed=3) == found[:7] and calibration_captions(7, seed=4) != found[:7]
    assert len({item.prompt for item in found}) > 600


def test_a_calibration_records_its_measurements(done: Path, micro_z: Path) -> None:
    found, rows = Calibration.load(done), _rows(done)
    assert len(rows) == COUNT and {row["prompt"] for row in rows}.isdisjoint(i.prompt for i in shapes_prompts())
    assert found.model == str(micro_z) and found.verifier == "shapes-verifier" and found.wanted == "correct"
    assert len(found.times) == 3 == len(found.schedules[0].taus) and found.branches == 2 and found.times[0] == 1.0
    assert all(0 <= tau <= 1 for schedule in found.schedules for tau in schedule.taus)
    assert len(found.report["agreement"]) == 3 and found.report["agreement"][-1]["n"] == COUNT
    assert [row["tau"] for row in found.report["curve"]] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    assert np.array([row["scores"] for row in rows]).shape == (COUNT, 3, 2)
    assert {row["correct"] for row in rows} <= {True, False}
    assert found.about["trajectories"] == COUNT and found.about["settings"]["sampler"] == "ancestral"


def test_an_interrupted_run_continues_and_ends_as_an_uninterrupted_one(
    done: Path, micro_z: Path, verifier: str, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(finished: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        calibrate_search(str(micro_z), verifier, tmp_path, **ASKED, report=stop)
    assert len(_rows(tmp_path)) == 16 and not (tmp_path / "thresholds.json").exists()
    first = tmp_path / "trajectories" / "00000.json"
    written = first.stat().st_mtime_ns
    calibrate_search(str(micro_z), verifier, tmp_path, **ASKED)
    assert _rows(tmp_path) == _rows(done) and first.stat().st_mtime_ns == written
    assert Calibration.load(tmp_path) == Calibration.load(done)
    # More of them keep what is there.
    calibrate_search(str(micro_z), verifier, tmp_path, **{**ASKED, "trajectories": COUNT + 3})
    assert len(_rows(tmp_path)) == COUNT + 3 and _rows(tmp_path)[:COUNT] == _rows(done)
    assert Calibration.load(tmp_path).about["trajectories"] == COUNT + 3
    grown = (tmp_path / "trajectories" / "00002.json").read_bytes()
    (tmp_path / "trajectories" / "00002.json").unlink()
    calibrate_search(str(micro_z), verifier, tmp_path, **{**ASKED, "trajectories": COUNT + 3})
    for row, again in zip(json.loads(grown), _rows(tmp_path)[32:], strict=True):  # at once and in two parts
        assert np.allclose(row["scores"], again["scores"], atol=1e-4) and row["prompt"] == again["prompt"]
    with pytest.raises(ValueError, match="trajectories with another seed; choose another folder"):
        calibrate_search(str(micro_z), verifier, tmp_path, **ASKED, seed=1)
    other = tmp_path / "verifier"
    torch.manual_seed(1)
    ShapesVerifier(vocabulary(), width=32, channels=16, depth=1, fusion_layers=1).save_pretrained(other)
    with pytest.raises(ValueError, match="trajectories with another weights"):
        calibrate_search(str(micro_z), str(other), tmp_path, **ASKED)


def test_a_failing_verifier_loses_no_chunk(
    micro_z: Path, verifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastgen.evaluation.verifiers.shapes_verifier import ShapesVerifier as Scorer

    score, calls = Scorer._score_batch, []

    def failing(self: Any, images: torch.Tensor, sides: list[Any]) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) > 8:
            raise KeyboardInterrupt
        return score(self, images, sides)

    monkeypatch.setattr(Scorer, "_score_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        calibrate_search(str(micro_z), verifier, tmp_path, **ASKED)
    assert len(_rows(tmp_path)) in (16, 32)


def test_without_a_checker_scores_stand_in(micro_z: Path, verifier: str, tmp_path: Path) -> None:
    prompts = ["a small red thing", "nothing at all", "two of them"]
    found = calibrate_search(
        str(micro_z), verifier, tmp_path, trajectories=32, prompts=prompts, settings={"branches": 2}
    )
    assert found.wanted == "score" and found.fixed is None and not found.report
    assert len(found.schedules) > 1 and set(found.quantiles) >= {"0.5", "0.8", "0.9"}
    assert [row["prompt"] for row in _rows(tmp_path)][:4] == [*prompts, prompts[0]]
    assert {row["correct"] for row in _rows(tmp_path)} == {None}
    with pytest.raises(ValueError, match="is an evaluation prompt"):
        calibrate_search(
            str(micro_z), verifier, tmp_path / "b", prompts=["x", shapes_prompts()[5].prompt], trajectories=32
        )
    assert not (tmp_path / "b").exists()


@pytest.fixture
def picture(tmp_path: Path) -> dict[str, str]:
    """Files of a picture and of a mask for it."""
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(pixels[..., 0] // 128 * 255).save(tmp_path / "mask.png")
    return {name: str(tmp_path / f"{name}.png") for name in ("image", "mask")}


@pytest.mark.parametrize("masked", long_tail([False, True], fast=[True]))
def test_a_pipeline_that_begins_with_a_picture_is_calibrated_and_searched_so(
    masked: bool, micro_z: Path, verifier: str, picture: dict[str, str], tmp_path: Path
) -> None:
    given = picture if masked else {"image": picture["image"]}
    settings = {**given, "strength": 0.75, "branches": 2, "steps": 4}
    found = calibrate_search(str(micro_z), verifier, tmp_path / "run", trajectories=32, settings=settings)
    assert len(found.times) == 3, "the first of four steps is not taken"
    assert found.signature["pipeline"] == ("ZImageInpaintPipeline" if masked else "ZImageImg2ImgPipeline")
    assert found.about["settings"]["strength"] == 0.75 and found.about["settings"]["image"]
    checkpoint = find_checkpoint(str(micro_z))
    pipe: Any = load_checkpoint(checkpoint, begins="mask_image" if masked else "image")
    begin: dict[str, Any] = {"image": Image.open(picture["image"]).convert("RGB"), "strength": 0.75}
    if masked:
        begin["mask_image"] = Image.open(picture["mask"])
    search = NoiseSearchPipeline(pipe, load_verifier(verifier), "threshold", thresholds=found)
    output = search("a ring", num_inference_steps=4, height=16, width=16, max_nfe=40, pipeline_kwargs=begin)
    assert output.reports[0].finished and output.reports[0].taus
    with pytest.raises(ValueError, match="Img2Img|Inpaint"):
        NoiseSearchPipeline(load_pipeline(str(micro_z)), load_verifier(verifier), "threshold", thresholds=found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0.5}, "strength: needs image"),
        ({"mask": "MASK"}, "mask: needs image"),
        ({"image": "IMAGE", "strength": 0}, "strength: 0"),
        ({"image": "nothing.png"}, "image: nothing.png is no picture"),
        ({"image": 3}, "image: 3 is no picture"),
    ],
)
def test_a_wrong_picture_is_refused_before_anything_is_drawn(
    settings: dict[str, Any], message: str, micro_z: Path, verifier: str, picture: dict[str, str], tmp_path: Path
) -> None:
    given = {name: picture.get(str(value).lower(), value) for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        calibrate_search(str(micro_z), verifier, tmp_path / "run", trajectories=32, settings=given)
    assert not (tmp_path / "run").exists()


def test_the_search_continues_with_the_first_sibling(micro_z: Path, verifier: str) -> None:
    """The picture is that of a plain stochastic trajectory, whatever else was tried."""
    pipe = load_pipeline(str(micro_z))
    settings: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "pt"}
    made = load_verifier(verifier)
    pictures = []
    for policy in (Threshold(float("-inf"), patience=1), Branching(3)):
        output = NoiseSearchPipeline(pipe, made, policy)(
            "a ring", generator=torch.Generator().manual_seed(5), **settings
        )
        pictures.append(output.images)
    assert torch.allclose(pictures[0], pictures[1], atol=1.5 / 255)
    assert output.reports[0].evaluations == 12 and output.reports[0].tries_by_time == [3, 3, 3, 3]


def test_a_verifier_brings_its_thresholds(done: Path, micro_z: Path, verifier: str, tmp_path: Path) -> None:
    folder = tmp_path / "verifier"
    shutil.copytree(verifier.partition(":")[2], folder)
    (folder / "thresholds").mkdir()
    (folder / "thresholds" / "micro.json").write_bytes((done / "thresholds.json").read_bytes())
    made = load_verifier(folder)
    assert [found.model for found in made.thresholds] == [str(micro_z)]
    search = NoiseSearchPipeline(load_pipeline(str(micro_z)), made)
    output = search("a ring", max_nfe=40, height=16, width=16, num_inference_steps=5)
    assert output.reports[0].policy.startswith("threshold, tau schedule(") and "price" in output.reports[0].policy
    (folder / "thresholds" / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json cannot be read"):
        load_verifier(folder)


def test_the_command_line(micro_z: Path, verifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "search-calibrate", "--part", str(micro_z), "--init", verifier, "-o", str(tmp_path / "run")]
    command += ["--samples", "32", "--set", "branches=2", "--set", "steps=2", "--json"]
    assert run(command) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert len(found["schedules"]) == len(Calibration.load(tmp_path / "run").schedules)
    assert "trajectories: 16 of 32" in captured.err


@pytest.mark.parametrize(
    "name",
    ["sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("stable-diffusion", "chroma", "lumina2"))],
)
def test_stock_pipelines_are_calibrated_and_searched_by_it(
    name: str, verifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through their own call: a run that was stopped continues, and `generate` searches by what it measured."""
    pipe, prompts = family(name), tmp_path / "prompts.txt"
    pipe.save_pretrained(tmp_path / "pipe")
    prompts.write_text("a small red thing\nnothing at all\n")
    scorer = tmp_path / "scorer"
    shutil.copytree(verifier.partition(":")[2], scorer)
    command = ["train", "search-calibrate", "--part", str(tmp_path / "pipe"), "--prompts-file", str(prompts)]
    command += ["--init", f"shapes-verifier:{scorer}", "-o", str(tmp_path / "run"), "--samples", "32"]
    command += ["--set", "branches=2", "--set", "steps=2", "--set", "height=32", "--set", "width=32"]
    with monkeypatch.context() as patch:
        patch.setattr("fastgen.training.search_calibrate._trajectories", stopping_after(1))
        with pytest.raises(KeyboardInterrupt):
            calibrate_search(
                str(tmp_path / "pipe"),
                f"shapes-verifier:{scorer}",
                tmp_path / "run",
                trajectories=32,
                prompts=prompts.read_text().split("\n")[:2],
                settings={"branches": 2, "steps": 2, "height": 32, "width": 32},
            )
    written = (tmp_path / "run/trajectories/00000.json").stat().st_mtime_ns
    assert not (tmp_path / "run/thresholds.json").exists() and len(_rows(tmp_path / "run")) == 16
    assert run(command) == 0
    assert (tmp_path / "run/trajectories/00000.json").stat().st_mtime_ns == written
    found = Calibration.load(tmp_path / "run")
    assert found.signature["pipeline"] == type(pipe).__name__ and found.wanted == "score"
    (scorer / "thresholds").mkdir()
    (scorer / "thresholds/own.json").write_bytes((tmp_path / "run/thresholds.json").read_bytes())
    command = ["generate", "a ring", "--model", str(tmp_path / "pipe"), "--method", "search", "-o"]
    command += [str(tmp_path / "ring.png"), "--verifier", f"shapes-verifier:{scorer}", "--max-nfe", "60"]
    assert run([*command, "--steps", "2", "--height", "32", "--width", "32"]) == 0, capsys.readouterr().err
    policy = json.loads((tmp_path / "ring.json").read_text())["search"]["policy"]
    assert policy.startswith("threshold, tau schedule(") and f"{tmp_path / 'pipe'}, price" in policy


def stopping_after(chunks: int) -> Any:
    """Draws as `_trajectories`, until Ctrl-C."""
    drawn: list[int] = []

    def trajectories(*arguments: Any) -> list[dict[str, Any]]:
        if len(drawn) == chunks:
            raise KeyboardInterrupt
        drawn.append(1)
        return _trajectories(*arguments)

    return trajectories


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "VERIFIER"], "needs --part, a diffusion pipeline"),
        (["--part", "MODEL"], "needs --init, a verifier"),
        (["--part", "MODEL", "--init", "mystery"], "'mystery' is unknown"),
        (["--part", "MODEL", "--init", "clip-score"], "--prompts-file: search-calibrate with verifier clip-score"),
        (["--part", "MODEL", "--init", "VERIFIER", "--samples", "5"], "trajectories: 5 is not allowed"),
        (["--part", "MODEL", "--init", "VERIFIER", "--samples", "-1"], "--samples: -1"),
        (["--part", "MODEL", "--init", "VERIFIER", "--lr", "1"], "No such option: --lr"),
        (["--part", "MODEL", "--init", "VERIFIER", "--data", "x"], "No such option: --data"),
        (["--part", "MODEL", "--init", "VERIFIER", "--set", "colour=1"], "settings: colour is unknown"),
        (["--part", "MODEL", "--init", "VERIFIER", "--set", "branches=0"], "branches: 0 is not allowed"),
        (
            ["--part", "tiny-janus", "--init", "VERIFIER"],
            "JanusImagePipeline cannot be searched: its start noise was not found",
        ),
        (["--part", "nowhere", "--init", "VERIFIER"], "'nowhere' is unknown"),
    ],
)
def test_bad_commands_end_in_one_line(
    arguments: list[str],
    message: str,
    micro_z: Path,
    verifier: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [{"MODEL": str(micro_z), "VERIFIER": verifier}.get(word, word) for word in arguments]
    assert run(["train", "search-calibrate", "-o", str(tmp_path / "run"), *given]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["steps", "num_inference_steps"])
def test_given_steps_override_those_of_the_model(name: str) -> None:
    found = _settings(find_checkpoint("tiny"), {name: 4})
    assert found["num_inference_steps"] == 4 and "steps" not in found
    assert _settings(find_checkpoint("tiny"), {})["num_inference_steps"] == 12
