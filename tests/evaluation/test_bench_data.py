"""`fastgen bench data`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.data import _draw, benchmark_data


def test_command_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data.json"
    assert run(["bench", "data", "--images", "64", "--runs", "2", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(out.read_text())
    assert [row["processes"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        rates = row["images_per_second"]
        assert row["n"] == 2 and 0 < rates["p20"] <= rates["p50"] <= rates["p80"]


def test_every_picture_is_drawn_once() -> None:
    assert [_draw(0, images) for images in (1, 256, 300)] == [1, 256, 300]


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(FastgenError, match="images: 0"):
        benchmark_data(images=0)
    with pytest.raises(FastgenError, match="processes: 0"):
        benchmark_data(processes=())
