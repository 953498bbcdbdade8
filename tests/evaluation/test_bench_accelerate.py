"""The benchmark of plans: rounds, their log, and the comparison with fewer steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen.cli.main import run
from fastgen.evaluation.benchmarks.accelerate import seconds_of_fewer_steps
from fastgen.pipelines.accelerate import Plan, Row
from fastgen.pipelines.accelerate.parts import FewerSteps, Guidance

NUMBERS = st.floats(0.1, 1.0)


def test_fewer_steps_at_equal_score_are_on_the_line_of_the_best_points() -> None:
    points = [(1.0, 0.8), (0.5, 0.6), (0.7, 0.5)]  # the last one is beaten
    assert seconds_of_fewer_steps(points, 0.7) == pytest.approx(0.75)
    assert seconds_of_fewer_steps(points, 0.8) == 1.0
    assert seconds_of_fewer_steps(points, 0.9) is None and seconds_of_fewer_steps(points, 0.4) is None


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=6))
def test_a_point_of_fewer_steps_never_beats_their_line(points: list[tuple[float, float]]) -> None:
    for seconds, score in points:
        needed = seconds_of_fewer_steps(points, score)
        assert needed is None or needed <= seconds + 1e-9


EXACT = "channels_last + prompt_padding"


@pytest.fixture
def command(micro_z: Path, tmp_path: Path) -> list[str]:
    parts = (FewerSteps(0.5), Guidance(0.5))
    Plan("ZImagePipeline", tuple(Row(part, True) for part in parts)).save(tmp_path / "plan.json")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square")
    options = {
        **{"--model": micro_z, "--plan": tmp_path / "plan.json", "--prompts-file": tmp_path / "prompts.txt"},
        **{"--metric": "ssim", "--share": 0.5, "--steps": 4, "--images": 4, "--log": tmp_path / "log.jsonl"},
    }
    return ["bench", "accelerate", *(str(each) for pair in options.items() for each in pair)]


def test_every_plan_is_drawn_in_every_round_and_a_killed_run_continues(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--out", str(tmp_path / "b.json")]) == 0
    assert "fewer_steps(0.5) + guidance(0.5)" in capsys.readouterr().out
    data: dict[str, Any] = json.loads((tmp_path / "b.json").read_text())
    rows = {row["plan"]: row for row in data["rows"]}
    assert set(rows) == {"stock", EXACT, "fewer_steps(0.5)", "fewer_steps(0.5) + guidance(0.5)"}
    assert rows["stock"]["largest_difference"] == 0 and rows["stock"]["score"] == pytest.approx(1.0)
    assert rows[EXACT]["loss"] == "exact" and rows[EXACT]["time_saved"] is None
    assert rows["fewer_steps(0.5)"]["ratio"][0] < 1 and rows["fewer_steps(0.5)"]["drop"][0] > 0
    assert data["settings"]["rounds"] == 4 and data["accelerate_seconds"]["p50"] > 0

    log = tmp_path / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3]) + lines[3][:20])  # killed while the third round was written
    assert run([*command, "--json"]) == 0
    assert log.read_text().splitlines(keepends=True)[:3] == lines[:3]
    assert json.loads(capsys.readouterr().out)["settings"]["rounds"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "2"], "--images: 2"),
        (["--minutes", "0"], "--minutes: 0"),
        (["--share", "1"], "share: 1.0"),
        (["--plan", "none.json"], "there is no file 'none.json'"),
        (["--metric", "shapes"], "'a red circle' is not one"),
        (["--minutes", "1e-9", "--log", "other.jsonl"], "only 0 rounds were finished"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str],
    message: str,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([*command, *options]) == 2
    err = capsys.readouterr().err
    assert message in err and err.strip().splitlines()[-1].startswith("error: ")
