"""Comparing results: intervals against simulation, gates and exit status, what does not compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.evaluation.compare import compare
from fastgen.evaluation.geneval.rules import ImageResult, summarize
from fastgen.evaluation.geneval.verdict_files import prompt_table
from fastgen.evaluation.measures import read_results
from fastgen.evaluation.shapesworld import shapes_prompts

PROMPTS = shapes_prompts()


def scores(chances: np.ndarray, rng: np.random.Generator, images: int = 4, **more: Any) -> dict[str, Any]:
    """A result of images that are correct with the chance of their prompt; `images` may differ by prompt."""
    results, prompts = [], []
    for number, (prompt, chance) in enumerate(zip(PROMPTS, chances, strict=True)):
        for _ in range(images):
            results.append(ImageResult(prompt.tag, number, bool(rng.random() < chance)))
            prompts.append(prompt)
    summary = summarize(results).as_dict()
    base = {"benchmark": "ShapesWorld-GenEval", "detector_name": "shapes", "detector": "abc"}
    return {**base, **summary, "prompts": prompt_table(prompts, results), **more}


def write(folder: Path, name: str, data: dict[str, Any]) -> Path:
    (folder / f"{name}.json").write_text(json.dumps(data))
    return folder / f"{name}.json"


def compared(folder: Path, a: dict[str, Any], b: dict[str, Any], **settings: Any) -> Any:
    return compare(*read_results([write(folder, "a", a), write(folder, "b", b)]), **settings)


def difficulty(rng: np.random.Generator) -> np.ndarray:
    """Prompts are easy or hard; few are in between."""
    return rng.beta(0.4, 0.3, len(PROMPTS))


def test_paired_interval_by_hand(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hard = difficulty(rng)
    a, b = scores(hard, rng), scores(np.clip(hard + 0.1, 0, 1), rng)
    found = compared(tmp_path, a, b)
    means = [{(r["tag"], r["prompt"]): r["correct"] / r["images"] for r in data["prompts"]} for data in (a, b)]
    variance = 0.0
    for row in found.rows[1:]:
        gaps = np.array([means[1][key] - means[0][key] for key in means[0] if key[0] == row.name])
        assert row.difference == pytest.approx(gaps.mean(), abs=1e-12)
        assert row.stderr == pytest.approx(gaps.std(ddof=1) / np.sqrt(len(gaps)), abs=1e-12)
        variance += row.stderr**2
    overall = found.rows[0]
    assert overall.name == "overall" and overall.paired and overall.gated
    assert overall.stderr == pytest.approx(np.sqrt(variance) / 6)
    assert overall.low == pytest.approx(overall.difference - 1.959964 * overall.stderr, abs=1e-6)
    independent = np.hypot(a["overall_stderr"], b["overall_stderr"])
    assert overall.stderr < 0.75 * independent  # what pairing is for


def test_intervals_cover_the_truth_and_false_alarms_are_rare(tmp_path: Path) -> None:
    """200 pairs of runs of the same prompts, b worse by a known amount. At least 95 % of the intervals hold the true
    difference (200 pairs: standard deviation 1.5 %), and where nothing changed 2.5 % are false alarms (1.1 %)."""
    rng = np.random.default_rng(1)
    hard = difficulty(rng)
    worse = np.clip(hard - 0.05, 0, 1)
    tags = np.array([prompt.tag for prompt in PROMPTS])
    truth = np.mean([(worse - hard)[tags == tag].mean() for tag in dict.fromkeys(tags)])
    hits, alarms = 0, 0
    for _ in range(200):
        a, b, same = (_light(chances, rng) for chances in (hard, worse, hard))
        found = compare(_result(a), _result(b)).rows[0]
        hits += found.low <= truth <= found.high
        alarms += compare(_result(a), _result(same)).regressed
    assert hits / 200 >= 0.9
    assert alarms / 200 <= 0.08


def _light(chances: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """`scores` without going through every image."""
    correct = rng.binomial(4, chances)
    rows = [
        {"id": i, "tag": p.tag, "prompt": p.prompt, "correct": int(c), "images": 4}
        for i, (p, c) in enumerate(zip(PROMPTS, correct, strict=True))
    ]
    tasks: dict[str, Any] = {}
    for tag in dict.fromkeys(row["tag"] for row in rows):
        tasks[tag] = {"score": float(np.mean([r["correct"] / 4 for r in rows if r["tag"] == tag])), "stderr": 0.01}
    overall = float(np.mean([task["score"] for task in tasks.values()]))
    return {"benchmark": "x", "tasks": tasks, "overall": overall, "overall_stderr": 0.01, "prompts": rows}


def _result(data: dict[str, Any]) -> Any:
    from fastgen.evaluation.measures import Result, _measures

    return Result(Path("x.json"), "x", data, data["benchmark"], tuple(_measures(data)), ())


@pytest.mark.parametrize(
    ("change", "settings", "regressed"),
    [
        (-0.2, {}, True),
        (0.0, {}, False),
        (0.2, {}, False),
        (-0.2, {"margin": 0.25}, False),  # a loss that is allowed
        (-0.2, {"margin": 0.05}, True),
        (0.0, {"prove": True}, True),  # nothing lost, but nothing proven either
        (0.0, {"prove": True, "margin": 0.1}, False),
        (0.2, {"prove": True}, False),
        (-0.2, {"gates": ["all"]}, True),
        (-0.2, {"gates": ["counting"]}, True),
        (0.2, {"gates": ["all"]}, False),
    ],
)
def test_gates(tmp_path: Path, change: float, settings: dict[str, Any], regressed: bool) -> None:
    rng = np.random.default_rng(8)
    hard = 0.25 + 0.5 * difficulty(rng)
    found = compared(tmp_path, scores(hard, rng), scores(hard + change, rng), **settings)
    assert found.regressed is regressed
    assert ("REGRESSION" in found.markdown()) is regressed
    verdict = {-0.2: "worse", 0.0: "no difference", 0.2: "better"}[change]
    assert found.rows[0].verdict == verdict
    assert [row.name for row in found.rows if row.failed] == [] or found.regressed


def test_more_gates_widen_the_intervals(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    a, b = scores(difficulty(rng), rng), scores(difficulty(rng), rng)
    one, seven = (compared(tmp_path, a, b, gates=gates) for gates in (["overall"], ["all"]))
    widths = [found.rows[0].high - found.rows[0].low for found in (one, seven)]
    assert widths[1] / widths[0] == pytest.approx(2.69011 / 1.95996, abs=1e-4)  # 1 - .05 / 7, two-sided


def test_equal_results_have_no_difference(tmp_path: Path) -> None:
    a = scores(difficulty(np.random.default_rng(0)), np.random.default_rng(1))
    found = compared(tmp_path, a, a, gates=["all"], prove=True)
    assert not found.regressed and all(row.low == row.high == 0 for row in found.rows)


def test_without_prompts_results_are_independent(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    a, b = ({k: v for k, v in scores(difficulty(rng), rng).items() if k != "prompts"} for _ in range(2))
    row = compared(tmp_path, a, b).rows[0]
    assert not row.paired and row.stderr == pytest.approx(np.hypot(a["overall_stderr"], b["overall_stderr"]))


def fid(value: float, stderr: float | None = 0.1, label: str = "fid[adm, 50k, inception-tf]") -> dict[str, Any]:
    metric = {"label": label, "better": "lower", "value": value}
    if stderr is not None:
        metric |= {"stderr": stderr, "ci95": [value - 2 * stderr, value + 2 * stderr]}
    recall = {"label": "recall[adm, 50k, inception-tf]", "better": "higher", "value": 0.5}
    return {"benchmark": "FID family", "metrics": {"fid": metric, "recall": recall}}


@pytest.mark.parametrize(
    ("b", "settings", "regressed"),
    [(3.5, {}, True), (2.5, {}, False), (3.1, {}, False), (3.5, {"margin": 0.1}, False), (3.1, {"prove": True}, True)],
)
def test_lower_is_better_for_distances(tmp_path: Path, b: float, settings: dict[str, Any], regressed: bool) -> None:
    found = compared(tmp_path, fid(3.0), fid(b), **settings)
    assert found.regressed is regressed
    assert [row.gated for row in found.rows] == [True, False] and found.rows[1].verdict == "no interval"
    assert found.rows[0].verdict == {3.5: "worse", 2.5: "better", 3.1: "no difference"}[b]


def test_what_does_not_compare(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = scores(difficulty(rng), rng)
    others = {**a, "prompts": [*a["prompts"][:-1], {**a["prompts"][-1], "prompt": "another"}]}
    for b, message in (
        (fid(3.0), "do not compare"),
        ({**a, "detector_name": "hf"}, "other detectors: shapes and hf"),
        ({**a, "detector": "other"}, "other weights of the detector"),
        ({**a, "detector": None}, "other weights of the detector: .* and unnamed ones"),
        ({key: value for key, value in a.items() if key != "detector_name"}, "other detectors: shapes and unnamed"),
        (others, "other prompts"),
    ):
        with pytest.raises(FastgenError, match=message):
            compared(tmp_path, a, b)
    with pytest.raises(FastgenError, match="fid.adm.*fid.clean"):
        both = [
            {**fid(3.0), "metrics": {"fid": fid(3.0, label=label)["metrics"]["fid"]}}
            for label in ("fid[adm]", "fid[clean]")
        ]
        compared(tmp_path, *both)
    with pytest.raises(
        FastgenError, match="--gate: 'speed' is not allowed, needs all or one of overall, single_object"
    ):
        compared(tmp_path, a, a, gates=["speed"])
    with pytest.raises(FastgenError, match="has no error"):
        compared(tmp_path, fid(3.0, None), fid(3.0), gates=["fid[adm, 50k, inception-tf]"])


def test_command_and_its_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(4)
    hard = 0.25 + 0.5 * difficulty(rng)
    a, worse = scores(hard, rng, seconds_per_image=1.0), scores(hard - 0.2, rng, seconds_per_image=1.5)
    files = [str(write(tmp_path, name, data)) for name, data in (("a", a), ("b", worse))]
    assert run(["eval", "compare", *files]) == 3
    text = capsys.readouterr().out
    assert "REGRESSION: overall" in text and "compared in pairs" in text and "1.500 times" in text
    assert run(["eval", "compare", *files[::-1], "--out", str(tmp_path / "x/c.json"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads((tmp_path / "x/c.json").read_text()) and data["regressed"] is False
    assert data["rows"][0]["difference"] == pytest.approx(a["overall"] - worse["overall"])
    assert run(["eval", "compare", *files[::-1], "--max-slowdown", "0.5"]) == 3
    assert "REGRESSION: seconds a picture" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--confidence", "1"], "confidence: 1.0"),
        (["--margin", "-1"], "margin: -1.0"),
        (["--max-slowdown", "0"], "max_slowdown: 0.0"),
        (["--max-slowdown", "2"], "does not say how long"),
        (["--gate", "beauty"], "--gate: 'beauty'"),
    ],
)
def test_bad_options(tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write(tmp_path, "a", fid(3.0)))
    assert run(["eval", "compare", file, file, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"benchmark": "x", "tasks": 3, "overall": 1}'])
def test_files_that_are_no_result(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text(content)
    good = str(write(tmp_path, "a", fid(3.0)))
    assert run(["eval", "compare", good, str(tmp_path / "bad.json")]) == 2
    assert "bad.json" in capsys.readouterr().err
    assert run(["eval", "compare", good, str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
