"""`fastgen eval geneval`: real detectors of tiny size, pictures from the renderer or by hand, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from geneval_oracle import official_summary
from PIL import Image
from tiny_mask2former import save, sees
from tiny_open_clip import save_open_clip

import fastgen.evaluation.geneval.mask2former as mask2former
import fastgen.evaluation.shapesworld as shapesworld
from fastgen.cli.main import run
from fastgen.evaluation.geneval.mask2former import CONVERTED_FILE
from fastgen.evaluation.geneval.prompts import official_prompts

RENDERS = ["eval", "geneval", "--detector", "shapes", "--model", "renders", "--limit", "2", "--images-per-prompt", "2"]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mask2former, "SHORT_SIDE", 64)  # for speed; the real size has tests of its own


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options: a Mask2Former that sees one cat all over every picture, a CLIP, and a photograph for the self-test."""
    pytest.importorskip("torchvision", reason="open_clip needs torchvision")
    home = tmp_path_factory.mktemp("judges")
    detector, clip = save(sees("cat"), home / "cat"), save_open_clip(home / "clip")
    (home / "photos").mkdir()
    Image.new("RGB", (48, 40), "tan").save(home / "photos" / "cat.png")
    return ["--detector", detector, "--color-model", clip, "--self-test-photos", str(home / "photos")]


def folder_of(*prompts: dict, images: int = 2, folder: str = "o") -> Path:
    """A folder in the official layout with plain pictures."""
    rng = np.random.default_rng(0)
    for number, prompt in enumerate(prompts):
        home = Path(folder) / f"{number:05d}"
        (home / "samples").mkdir(parents=True)
        (home / "metadata.jsonl").write_text(json.dumps(prompt) + "\n")
        (home / "grid.png").write_bytes(b"not looked at")
        for image in range(images):
            pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / "samples" / f"{image:04d}.png")
    return Path(folder)


def prompt(name: str, tag: str = "single_object", **more: object) -> dict:
    return {"tag": tag, "include": [{"class": name, "count": 1, **more}], "prompt": f"a photo of a {name}"}


def test_generates_scores_and_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*RENDERS, "--out", "o", "--json"]) == 0
    out = capsys.readouterr().out
    data = json.loads(out)
    assert out.count("\n") == 1
    assert (data["benchmark"], data["detector_name"]) == ("ShapesWorld-GenEval", "shapes")
    assert data["n_images"] == 24 and data["n_prompts"] == len(data["prompts"]) == 12 and len(data["tasks"]) == 6
    assert min(row["score"] for row in data["self_test"]["photos"]) > 0.9
    assert data["settings"]["images_made_now"] == 24 and data["seconds_per_image"] > 0
    saved = json.loads(Path("o/scores.json").read_text())
    assert {**saved, "results": data["results"]} == data
    summary = official_summary(Path("o/results.jsonl"))
    assert summary["overall"] == pytest.approx(data["overall"]) and summary["overall"] > 0.9
    assert "detector=shapes" in Path("o/scores.md").read_text()
    assert not list(Path("o").glob(".work/*"))  # what was kept for resuming is gone
    assert run([*RENDERS, "--out", "o", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["settings"]["images_made_now"] == 0 and again["tasks"] == data["tasks"]
    assert run(["eval", "geneval", "--results", "o/results.jsonl", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["tasks"] == data["tasks"] and read["overall_stderr"] == pytest.approx(data["overall_stderr"])
    assert read["detector_name"] == "shapes"


def test_same_command_continues_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, made in (("0", 24), ("0", 0), ("1", 24)):
        assert run([*RENDERS, "--seed", seed, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["settings"]["images_made_now"] == made
    assert len(list(Path("fastgen-eval").glob("geneval-renders-*"))) == 2


def test_a_folder_through_mask2former_and_clip(judges: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    colored = prompt("cat", "colors", color="red")
    folder_of(prompt("cat"), prompt("dog"), {**prompt("cat"), "prompt": "again"}, colored)
    before = sorted(Path("o").rglob("*"))
    assert run(["eval", "geneval", "--images", "o", *judges, "--partial", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert sorted(Path("o").rglob("*")) == before  # nothing is written without --out
    assert (data["benchmark"], data["detector_name"]) == ("GenEval (HF-M2F)", "hf")
    assert len(data["judge"]["detector_sha256"]) == len(data["judge"]["color_model_sha256"]) == 64
    assert [row["correct"] for row in data["prompts"][:3]] == [2, 0, 2] and data["tasks"]["single_object"][
        "score"
    ] == 2 / 3
    assert data["differs"] == "other prompts than the 553 official ones"
    assert run(["eval", "geneval", "--images", "o", *judges, "--out", "s"]) == 0
    text = capsys.readouterr().out
    for words in ("GenEval (HF-M2F): 8 images of 4 prompts, detector=hf", "single_object   0.667", "correct images",
                  "not the official protocol"):  # fmt: skip
        assert words in text
    records = [json.loads(line) for line in Path("s/results.jsonl").read_text().splitlines()]
    assert {record["detector"] for record in records} == {"hf"}
    assert json.loads(records[0]["details"])["cat"][0][:4] == [0, 0, 40, 30]
    assert records[2]["reason"] == "expected dog>=1, found 0"
    colours = {record["reason"] for record in records[6:]}
    assert all(reason == "" or reason.startswith("expected red cat>=1, found 1 ") for reason in colours)


def test_a_converted_detector_is_named_so(
    judges: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = Path(save(sees("cat"), tmp_path / "converted"))
    (detector / CONVERTED_FILE).write_text("{}")
    folder_of(prompt("cat"))
    options = ["--detector", str(detector), *judges[2:], "--partial"]
    assert run(["eval", "geneval", "--images", "o", *options]) == 0
    assert "GenEval (converted M2F): 2 images of 1 prompts, detector=mmdet-converted" in capsys.readouterr().out


def test_a_detector_that_does_not_see_scores_nothing(
    judges: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(prompt("cat"))
    blind = ["--detector", save(sees("dog"), tmp_path / "dog"), *judges[2:]]
    assert run(["eval", "geneval", "--images", "o", *blind, "--partial", "--out", "s"]) == 2
    error = capsys.readouterr().err
    assert "must see a cat in cat.png above 0.9" in error and error.count("\n") == 1
    assert not list(Path("s").iterdir())
    assert run(["eval", "geneval", "--images", "o", *blind[:4], "--partial", "--no-self-test"]) == 0
    assert "the detector was not tested (--no-self-test)" in capsys.readouterr().out


# --- bad input ---------------------------------------------------------------------------------------------------


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error that the user can correct; nothing on stdout."""
    assert run(["eval", "geneval", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs one of --model, --images and --results, got none"),
        (["--model", "tiny", "--images", "o"], "got --model and --images"),
        (["--images", "none"], "--images: none: no such folder"),
        (["--images", "empty"], "empty: has no prompt folders"),
        (["--images", "empty", "--steps", "3"], "--steps: not allowed with --images"),
        (["--results", "none.jsonl"], "none.jsonl: there is no such file"),
        (["--results", "o.jsonl", "--tail-drop", "0.5"], "--tail-drop: not allowed"),
        (["--model", "renders", "--limit", "0"], "--limit: 0"),
        (["--model", "nonsense"], "nonsense"),
        (["--images", "empty", "--device", "abacus"], "abacus"),
        (["--images", "empty", "--out", "file"], "file"),
        (["--model", "renders", "--metadata", "none.jsonl"], "none.jsonl: no such file"),
        (["--images", "empty", "--detector", "empty"], "detector mask2former: empty has no config.json"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("file").write_text("")
    judged = ["--no-self-test"] if "--detector" in arguments else ["--detector", "shapes"]
    assert message in fails([*arguments, *judged], capsys)


def shapes_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*RENDERS, "--out", "o"]) == 0
    capsys.readouterr()
    for name in ("results.jsonl", "scores.json", "scores.md"):
        Path("o", name).unlink()


SCORE = ["--images", "o", "--detector", "shapes", "--no-self-test"]


def test_damaged_images_are_named_before_work_begins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes_folder(capsys)
    for name in ("00003/samples/0001.png", "00007/samples/0000.png"):
        path = Path("o", name)
        path.write_bytes(path.read_bytes()[:-30])
    monkeypatch.setattr(shapesworld, "render_prompts", lambda *_: pytest.fail("drew"))
    error = fails(SCORE, capsys)
    assert "o/00003/samples/0001.png: not a readable image" in error and "(and 1 more)" in error
    Path("o/00003/samples/0001.png").write_bytes(b"")
    assert "o/00003/samples/0001.png: not a readable image" in fails(SCORE, capsys)


def test_missing_images_and_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    shapes_folder(capsys)
    Path("o/00004/samples/0001.png").unlink()
    error = fails(SCORE, capsys)
    assert "1 of 12 prompts have fewer than 2 images, 00004 has 1; score what is there with --partial" in error
    assert run(["eval", "geneval", *SCORE, "--partial"]) == 0
    assert "partial: 1 of 12 prompts have fewer" in capsys.readouterr().out
    Path("o/00004/samples/0000.png").unlink()
    assert "o/00004/samples: has no image" in fails(SCORE, capsys)


def test_prompts_of_a_file_that_have_no_images(capsys: pytest.CaptureFixture[str]) -> None:
    shapes_folder(capsys)
    lines = [path.read_text() for path in sorted(Path("o").glob("*/metadata.jsonl"))]
    Path("all.jsonl").write_text("".join([*lines, json.dumps(prompt("star")) + "\n"]))
    error = fails([*SCORE, "--metadata", "all.jsonl"], capsys)
    assert "1 of 13 prompts have no images, the first is 'a photo of a star'" in error
    Path("all.jsonl").write_text("".join(lines))
    assert run(["eval", "geneval", *SCORE, "--metadata", "all.jsonl"]) == 0


def test_a_part_of_the_official_prompts_is_no_benchmark(judges: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(*(item.as_dict() for item in official_prompts()[:3]))
    error = fails(["--images", "o", *judges], capsys)
    assert "550 of 553 prompts have no images, the first is 'a photo of a clock'" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "unicorn"}, "o/00001/metadata.jsonl: unknown class 'unicorn'"),
        ({"class": "cat", "color": "mauve"}, "o/00001/metadata.jsonl: unknown colour 'mauve'"),
        ({"class": "cat", "number": 3}, "o/00001/metadata.jsonl:1: .*unknown number"),
    ],
)
def test_metadata_that_cannot_be_judged(
    judges: list[str], change: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    second = prompt("cat")
    second["include"][0] |= change
    folder_of(prompt("cat"), second)
    assert re.search(message, fails(["--images", "o", *judges], capsys))
    Path("m.jsonl").write_text(json.dumps(prompt("cat")) + "\n" + json.dumps(second) + "\n")
    error = fails(["--model", "tiny", "--metadata", "m.jsonl", *judges], capsys)
    assert "m.jsonl:2: " in error and not Path("fastgen-eval").exists()


JUDGED = ["eval", "geneval", "--detector", "shapes", "--no-self-test"]


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ([*JUDGED, "--model", "renders", "--metadata", "twice.jsonl"], "twice.jsonl:3"),
        ([*JUDGED, "--images", "o", "--partial"], "o/00002/metadata.jsonl"),
        (["eval", "shapes", "--images", "o"], "o/00002/metadata.jsonl"),
        (["eval", "geneval", "--results", "other.jsonl"], "other.jsonl:3"),
        (["eval", "fid", "--model", "tiny", "--prompts", "twice.jsonl"], "twice.jsonl:3"),
        (["eval", "fid", "--model", "tiny", "--prompts", "twice.txt"], "prompt 3"),
    ],
)
def test_a_prompt_that_stands_twice_is_refused_before_anything_is_drawn_or_judged(
    words: list[str], place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result of such prompts would be one that `report` and `compare` refuse, or count the same pictures twice."""
    items = [prompt(name) for name in ("circle", "ring", "circle")]
    folder_of(*items)
    Path("twice.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    Path("twice.txt").write_text("".join(item["prompt"] + "\n" for item in items))
    verdicts = [
        {"filename": f"{i}.png", "tag": item["tag"], "prompt": item["prompt"], "correct": True, "reason": ""}
        | {"metadata": {**item, "include": [{"class": "circle", "count": 1 + i}]}}
        for i, item in enumerate(items)
    ]
    Path("other.jsonl").write_text("".join(json.dumps(verdict) + "\n" for verdict in verdicts))
    for part in ("samples.judge_samples", "runner.EvaluationRun.generate"):
        monkeypatch.setattr(f"fastgen.evaluation.{part}", None)  # neither drawn nor judged
    assert run(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert place in err and "already" in err


def test_an_option_given_twice_is_one_row(micro_z: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "bench",
        "generate",
        "--model",
        str(micro_z),
        "--no-cold",
        "--runs",
        "1",
        "--steps",
        "1",
        "--json",
    ]
    assert run([*words, "--batch", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)["warm"]
    assert run([*words, "--batch", "1", "--batch", "1"]) == 0
    assert len(json.loads(capsys.readouterr().out)["warm"]) == len(rows) > 0


def test_drafters_of_one_name_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "speculative", "--drafter", "a/x", "--drafter", "b/x"]) == 2
    assert "--drafter: 'x' names two folders" in capsys.readouterr().err
