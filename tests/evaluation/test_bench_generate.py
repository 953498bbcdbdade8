"""The benchmark of `fastgen generate`: honest numbers, and none when the pictures are wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fastgen.cli.main import run
from fastgen.environment import environment
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks import generate as bench
from fastgen.evaluation.benchmarks import measure
from fastgen.evaluation.results_page import generate_markdown


def test_measure_process_sees_time_and_memory() -> None:
    ballast = b"x" * 300_000_000  # the memory of this process must not count
    small = measure.measure_process([sys.executable, "-c", "print('hi')"])
    big = measure.measure_process([sys.executable, "-c", "import time; x = b'x' * 200_000_000; time.sleep(1)"])
    assert small[2] == "hi\n" and big[0] > 1 and len(ballast) > 0
    assert small[1] is None or (small[1] < 60e6 and 200e6 < (big[1] or 0) < 260e6)
    with pytest.raises(FastgenError, match="failed with 3.*oops"):
        measure.measure_process([sys.executable, "-c", "import sys; print('oops', file=sys.stderr); sys.exit(3)"])


def test_environment_is_json() -> None:
    where = environment()
    json.dumps(where)
    assert where["versions"]["torch"] and where["threads"] >= 1 and where["date"].endswith("+00:00")


def test_command_writes_rows(
    micro_z: Path, micro_janus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "bench.json"
    arguments = ["bench", "generate", "--model", str(micro_z), "--model", str(micro_janus), "--runs", "2"]
    arguments += ["--batch", "1", "--batch", "2", "--steps", "2", "--no-cold"]
    assert run([*arguments, "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(out.read_text())
    rows = [(Path(r["model"]).name, r["batch"], r["batch_invariant"]) for r in result["warm"]]
    assert rows == [(m, b, i) for m in ("z", "janus") for b, i in ((1, True), (2, True), (2, False))]
    for row in result["warm"]:
        assert row["n"] == 2
        for name in ("seconds_per_image", "seconds_per_step"):
            assert 0 < row[name]["p20"] <= row[name]["p50"] <= row[name]["p80"]
        assert row["seconds_per_step"]["p50"] < row["seconds_per_image"]["p50"] * row["batch"]
    assert "| s/picture p20 |" in generate_markdown(result).replace("n | s/", "| s/")


def test_cold_rows_count_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fake(command: list[str], **kwargs: Any) -> tuple[float, int, str]:
        commands.append(command)
        return float(len(commands)), 1000, "0.125\n"

    monkeypatch.setattr(bench, "measure_process", fake)
    rows = bench._cold_rows(["tiny", "tiny-janus"], None, 3, 8, "cpu", "auto")
    assert len(commands) == 4 * 4 and all(row["n"] == 3 for row in rows)
    assert rows[0]["seconds"] == {"p20": 0.125, "p50": 0.125, "p80": 0.125}
    assert rows[1]["first_run_seconds"] == 5.0 and rows[1]["seconds"]["p50"] == 7.0
    assert "--steps" in commands[-5] and "--steps" not in commands[-1]


def test_wrong_pictures_are_not_timed(micro_z: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastgen.pipelines.generation as generation

    original = generation.generate_images

    def depends_on_the_batch(pipe: Any, prompts: Any, seeds: Any, **options: Any) -> Any:
        return original(pipe, prompts, [seed + options["batch_size"] for seed in seeds], **options)

    monkeypatch.setattr(generation, "generate_images", depends_on_the_batch)
    with pytest.raises(FastgenError, match="depend on the batch size"):
        bench.benchmark_generate([str(micro_z)], runs=1, cold=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "--runs"),
        (["--batch", "0"], "--batch"),
        (["--steps", "0"], "--steps"),
        (["--model", "tinny"], "unknown"),
        (["--dtype", "int8"], "dtype"),
        (["--out", "/dev/null/x/bench.json"], "folder"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "generate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err
