"""Files of other versions: each is read, or refused with its version."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastgen.cli.main import run
from fastgen.cli.plan import Job, unfinished_jobs
from fastgen.errors import FastgenError
from fastgen.evaluation.runner import EvaluationRun, RunSettings
from fastgen.evaluation.shapesworld import shapes_prompts
from fastgen.pipelines.accelerate import Plan

SETTINGS = RunSettings(model="m", model_fingerprint="0", images_per_prompt=1)


def plan(folder: Path, change: dict[str, Any]) -> None:
    Plan("ZImagePipeline", ()).save(folder / "plan.json")
    _rewrite(folder / "plan.json", change)
    Plan.load(folder / "plan.json")


def run_file(folder: Path, change: dict[str, Any]) -> None:
    EvaluationRun(folder / "run", shapes_prompts(1), SETTINGS)
    _rewrite(folder / "run" / "run.json", change)
    EvaluationRun(folder / "run", shapes_prompts(1), SETTINGS)


def sidecar(folder: Path, change: dict[str, Any]) -> None:
    job = Job("a ring", 0, folder / "a.png")
    job.sidecar.write_text(json.dumps({"format": 1, "settings": {}}))
    _rewrite(job.sidecar, change)
    assert unfinished_jobs([job], overwrite=True, strict=False) == [job]
    unfinished_jobs([job], overwrite=False, strict=False)


def _rewrite(path: Path, change: dict[str, Any]) -> None:
    data = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


READERS: list[Callable[[Path, dict[str, Any]], None]] = [plan, run_file, sidecar]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("found", [99, 0, -1, True, 1.0, "2", [], {"a": 1}])
def test_another_format_is_refused_with_its_number(read: Any, found: Any, tmp_path: Path) -> None:
    with pytest.raises(FastgenError) as error:
        read(tmp_path, {"format": found})
    text = str(error.value)
    assert str(found) in text and "this version of fastgen reads" in text and "\n" not in text
    assert ("update fastgen" in text) == (found == 99)


@pytest.mark.parametrize("read", READERS)
def test_the_format_that_is_written_is_read(read: Any, tmp_path: Path) -> None:
    read(tmp_path, {})


def test_a_file_without_a_format_is_refused_or_is_a_sidecar_of_an_older_version(tmp_path: Path) -> None:
    for read in (plan, run_file):
        with pytest.raises(FastgenError, match="has no format number"):
            read(tmp_path, {"format": None})
    sidecar(tmp_path, {"format": None})


def test_the_command_line_refuses_a_newer_plan_in_one_line(
    micro_z: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"format": 9}))
    words = ["generate", "a ring", "--model", str(micro_z), "--plan", str(tmp_path / "plan.json")]
    assert run([*words, "-o", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and "format 9" in error
