"""`fastgen eval`: options, output, errors; the detector is a stand-in, the pictures come from the renderer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from evaluation_fakes import PixelModel

import fastgen.evaluation.geneval.shapes_checker as checker_module
import fastgen.evaluation.shapesworld as shapesworld
from fastgen.cli.main import run
from fastgen.evaluation.fid.fd_shapes import FDShapes
from fastgen.pipelines.accelerate import Plan, Row
from fastgen.pipelines.accelerate.parts import FewerSteps


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(checker_module, "load_detector", lambda folder=None, device="cpu": PixelModel())
    monkeypatch.setattr(shapesworld, "FDShapes", partial(FDShapes, n_reference=64, cache_dir=tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


RENDERS = ["eval", "shapes", "--model", "renders", "--limit", "3", "--images-per-prompt", "2"]


def test_json_is_one_object_on_stdout(tmp_path, capsys) -> None:
    assert run([*RENDERS, "--out", "o", "--sheet", "s/sheet.png", "--captions", "--json"]) == 0
    out = capsys.readouterr().out
    data = json.loads(out)
    assert out.count("\n") == 1
    assert data["benchmark"] == "ShapesWorld-GenEval" and data["model"] == "renders"
    assert len(data["tasks"]) == 6 and data["n_images"] == 36
    assert data["fd_shapes"]["value"] > 0
    assert data["seconds_per_image"] > 0 and data["environment"]["versions"]["torch"]
    assert data["settings"]["images_made_now"] == 36
    assert {"generate", "check", "fd"} <= set(data["stats"]["seconds"])
    saved = json.loads((tmp_path / "o/scores.json").read_text())
    assert {**saved, "results": data["results"]} == data
    assert len((tmp_path / "o/results.jsonl").read_text().splitlines()) == 36
    assert (tmp_path / "s/sheet.png").is_file()


def test_text_names_every_score(capsys) -> None:
    assert run([*RENDERS, "--out", "o"]) == 0
    out = capsys.readouterr().out
    for name in ("ShapesWorld-GenEval", "single_object", "color_attr", "mean of tasks", "±", "FD-shapes[64"):
        assert name in out
    assert "s per image" in out and "torch" in out
    assert "FID" not in out and "GenEval" not in out.replace("ShapesWorld-GenEval", "")


def test_same_command_continues_its_run_and_another_starts_its_own(tmp_path, capsys) -> None:
    for seed, made in (("0", 36), ("0", 0), ("1", 36)):
        assert run([*RENDERS, "--seed", seed, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["settings"]["images_made_now"] == made
    assert len(list((tmp_path / "fastgen-eval").iterdir())) == 2


def test_scores_a_folder_and_leaves_it_alone(tmp_path, capsys) -> None:
    assert run([*RENDERS, "--out", "o", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    before = sorted(p.as_posix() for p in (tmp_path / "o").rglob("*"))
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "o").rglob("*")}
    assert run(["eval", "shapes", "--images", "o", "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["tasks"] == first["tasks"] and second["fd_shapes"] == first["fd_shapes"]
    assert "model" not in second and "seconds_per_image" not in second
    assert sorted(p.as_posix() for p in (tmp_path / "o").rglob("*")) == before
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "o").rglob("*")} == stamps
    assert run(["eval", "shapes", "--images", "o", "--out", "scores"]) == 0
    assert (tmp_path / "scores/scores.json").is_file()


def test_small_set_says_why_it_has_no_distance(monkeypatch, capsys) -> None:
    monkeypatch.setattr(PixelModel, "dims", 64)
    assert run([*RENDERS, "--limit", "1", "--out", "o"]) == 0
    assert "no value, 12 images are too few" in capsys.readouterr().out
    assert run([*RENDERS, "--limit", "1", "--out", "o", "--allow-small", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fd_shapes"]["value"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--images-per-prompt", "0"], "--images-per-prompt: 0"),
        (["--steps", "0"], "--steps: 0"),
        (["--batch-size", "-1"], "--batch-size: -1"),
        (["--limit", "0"], "--limit: 0"),
        (["--guidance-scale", "-1"], "--guidance-scale"),
        (["--guidance-scale", "nan"], "--guidance-scale"),
        (["--seed", "-1"], "--seed: -1"),
        (["--sheet", "sheet.jpg"], "--sheet"),
        (["--model", "nonsense"], "nonsense"),
        (["--device", "abacus"], "abacus"),
        (["--dtype", "float3"], "float3"),
        (["--out", "file"], "file"),
        (["--sheet", "file/sheet.png"], "file"),
        (["--images", "none"], "none"),
        (["--images", "empty"], "empty"),
    ],
)
def test_bad_options_are_one_line_and_exit_2_before_any_work(tmp_path, monkeypatch, capsys, args, message) -> None:
    monkeypatch.setattr(shapesworld, "render_prompts", lambda *_: pytest.fail("started to draw"))
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    model = [] if {"--images", "--model"} & set(args) else ["--model", "renders"]
    assert run(["eval", "shapes", *model, *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_generation_options_are_refused_with_images(tmp_path, capsys) -> None:
    (tmp_path / "o").mkdir()
    assert run(["eval", "shapes", "--images", "o", "--steps", "4", "--model", "tiny"]) == 2
    assert "--model, --steps: not allowed with --images" in capsys.readouterr().err
    assert run(["eval", "shapes", "--images", "o", "--tail-drop", "0.3", "--token-budget", "4"]) == 2
    assert "--tail-drop, --token-budget: not allowed with --images" in capsys.readouterr().err


def test_changed_settings_are_refused(tmp_path, capsys) -> None:
    assert run([*RENDERS, "--out", "o", "--json"]) == 0
    capsys.readouterr()
    assert run([*RENDERS, "--out", "o", "--seed", "9"]) == 2
    assert "seed is 0 there and 9 now" in capsys.readouterr().err
    assert run([*RENDERS, "--out", "o", "--limit", "2"]) == 2
    assert "prompts are others" in capsys.readouterr().err


def test_missing_checker_costs_no_generation(monkeypatch, capsys) -> None:
    from fastgen.errors import FastgenError

    def missing(folder=None, device="cpu"):
        raise FastgenError("assets/shapes-detector: has no ShapesWorld detector")

    monkeypatch.setattr(checker_module, "load_detector", missing)
    monkeypatch.setattr(shapesworld, "render_prompts", lambda *_: pytest.fail("started to draw"))
    assert run([*RENDERS, "--out", "o"]) == 2
    assert "no ShapesWorld detector" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--method", "faster"], "--method"),
        (["--tree", "jacobi-4"], "needs --method speculative"),
        (["--method", "speculative", "--tree", "tall"], "--tree"),
        (["--method", "speculative", "--acceptance", "loose"], "--acceptance"),
        (["--method", "speculative", "--acceptance", "cascade", "--quality", "-1"], "--quality"),
        (["--drafter", "none"], "needs --method speculative"),
        (["--model", "tiny-janus", "--method", "speculative", "--drafter", "/nowhere/at/all"], "config.json"),
    ],
)
def test_bad_options_of_speculative_decoding(
    options: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", "shapes", "--model", "tiny-janus", *options]) == 2
    error = capsys.readouterr().err
    assert word in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--policy", "rbf"], "--policy: needs --method search"),
        (["--method", "base", "--max-nfe", "48"], "--max-nfe: needs --method search"),
        (["--method", "search", "--policy", "luck"], "luck"),
        (["--method", "search", "--max-nfe", "3"], "max_nfe"),
        (["--method", "search", "--max-nfe", "48", "--target-score", "2"], "--target-score"),
        (["--method", "search", "--policy", "best-of-n", "--max-nfe", "48", "--sampler", "ancestral"], "--sampler"),
        (["--method", "search", "--model", "tiny-janus"], "draws tokens"),
        (["--method", "search", "--model", "renders"], "no model"),
        (["--method", "dc", "--model", "tiny"], "no dynamic chunking"),
        (["--method", "base", "--model", "small-dc"], "has dynamic chunking"),
        (["--method", "search", "--images", "."], "--method: not allowed with --images"),
    ],
)
def test_bad_options_of_search(options: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is drawn, and no run begins."""
    assert run(["eval", "shapes", *options]) == 2
    error = capsys.readouterr().err
    assert word in error and len(error.strip().splitlines()) == 1


def test_a_model_is_scored_through_speculative_decoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six pictures of the embedded model; the settings are in the report."""
    options = ["--model", "tiny-janus", "--method", "speculative", "--tree", "jacobi-8", "--fast-batches"]
    counts = ["--limit", "1", "--images-per-prompt", "1", "--json", "--out", str(tmp_path / "run")]
    assert run(["eval", "shapes", *options, *counts]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_images"] == 6
    assert (report["settings"]["method"], report["settings"]["tree"]) == ("speculative", "jacobi-8")
    assert report["stats"]["passes"]["target"] < 256


SEARCH = ["eval", "shapes", "--method", "search", "--steps", "2", "--policy", "best-of-n", "--max-nfe", "8"]
SIX = ["--limit", "1", "--images-per-prompt", "1", "--json", "--allow-small"]


def test_a_model_is_scored_through_a_search(capsys: pytest.CaptureFixture[str]) -> None:
    """Six pictures of the embedded model, by the default verifier; another search is another run."""
    for more, made in (([], 6), ([], 0), (["--target-score", "0.9"], 6)):
        assert run([*SEARCH, *SIX, *more]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["settings"]["images_made_now"] == made
    assert report["settings"]["method"] == "search" and report["model"] == "tiny"
    search = report["settings"]["search"]
    assert search["policy"] == "best-of-n" and search["target_score"] == 0.9 and len(search["verifier_files"]) == 16
    assert report["stats"]["verifier_calls"] >= 6


def test_what_an_interrupted_search_had_is_no_image_of_the_run(
    micro_z: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A verifier that fails in the third picture leaves two; the same command finishes as an uninterrupted run."""
    from fastgen.evaluation.verifiers.shapes_verifier import ShapesVerifier

    command = [*SEARCH, *SIX, "--model", str(micro_z), "--verifier", "shapes-verifier", "--batch-invariant"]
    assert run([*command, "--out", "whole"]) == 0
    score, calls = ShapesVerifier._score_batch, []

    def failing(self, images, sides):
        calls.append(len(images))
        if len(calls) == 6:  # two pictures are tried for a prompt
            raise RuntimeError("out of memory")
        return score(self, images, sides)

    with monkeypatch.context() as patch:
        patch.setattr(ShapesVerifier, "_score_batch", failing)
        assert run([*command, "--out", "part"]) != 0
    assert "out of memory" in capsys.readouterr().err and set(calls) == {1}
    assert len(list((tmp_path / "part").glob("*/samples/*.png"))) == 2
    assert run([*command, "--out", "part"]) == 0
    for path in (tmp_path / "whole").glob("*/samples/*.png"):
        assert path.read_bytes() == (tmp_path / "part" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_eval_draws_with_a_plan_and_records_it(micro_z: Path, tmp_path: Path, capsys) -> None:
    Plan("ZImagePipeline", (Row(FewerSteps(0.25), True),)).save("plan.json")
    Plan("FluxPipeline", ()).save("other.json")
    drawn = ["eval", "shapes", "--model", str(micro_z), "--steps", "8", "--limit", "1", "--images-per-prompt", "1"]
    nfe = []
    for options in ([], ["--plan", "plan.json"]):
        assert run([*drawn, "--allow-small", "--json", *options]) == 0
        report = json.loads(capsys.readouterr().out)
        nfe.append(report["stats"]["nfe"])
    assert report["settings"]["plan"] == [["fewer_steps", {"share": 0.25}]]
    assert nfe[1] * 4 == nfe[0]
    assert len(list((tmp_path / "fastgen-eval").iterdir())) == 2
    for refused, message in (
        (["--plan", "nothing.json"], "there is no file 'nothing.json'"),
        (["--plan", "plan.json", "--method", "search"], "--plan: not with --method search"),
        (["--plan", "other.json"], "is of a FluxPipeline, and the model is a ZImagePipeline"),
    ):
        assert run([*drawn, *refused]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and message in err
