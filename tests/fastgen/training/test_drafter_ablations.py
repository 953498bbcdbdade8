"""`fastgen bench drafter-ablations`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastgen.cli.main import run
from fastgen.training import drafter_ablations
from fastgen.training.drafter_ablations import TREES, VARIANTS

NAMES = ["default", "class cross-entropy, convergence", "soft targets", "Medusa"]


def command(folder: Path, names: list[str]) -> list[str]:
    options = [word for name in names for word in ("--variant", name)]
    sizes = ["--steps", "2", "--batch-size", "2", "--pictures", "2"]
    return ["bench", "drafter-ablations", "--folder", str(folder), *sizes, *options]


@pytest.mark.slow
def test_rows_of_two_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(drafter_ablations, "TREES", TREES[:1])
    out = tmp_path / "a.json"
    assert run([*command(tmp_path / "f", NAMES[:2]), "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    first, second = printed["rows"]
    assert first["trees"][TREES[0]]["difference"] == 0 == first["trees"][TREES[0]]["stderr"]
    assert second["changes"] == {"redundancy": "class", "convergence": True}
    for row in (first, second):
        assert row["trees"][TREES[0]]["accepted_length"] >= 1 and row["parameters"] > 0


@pytest.mark.slow
def test_more_variants_and_a_second_run(tmp_path: Path, capsys: Any) -> None:
    assert run([*command(tmp_path / "f", NAMES), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["variant"] for row in rows] == NAMES and set(rows[0]["trees"]) == set(TREES)
    assert rows[3]["parameters"] != rows[0]["parameters"]
    # The variants are trained: a second run says the same.
    assert run(command(tmp_path / "f", NAMES)) == 0
    assert f"{rows[1]['trees'][TREES[0]]['accepted_length']:.3f}" in capsys.readouterr().out


def test_the_default_changes_nothing_and_the_others_differ() -> None:
    changes = [json.dumps(change) for change in VARIANTS.values()]
    assert changes[0] == "{}" and len(set(changes)) == len(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [(["--variant", "none"], "variant"), (["--pictures", "1"], "pictures"), (["--part", "tiny"], "no Janus")],
)
def test_bad_arguments(change: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    assert run(["bench", "drafter-ablations", "--folder", str(tmp_path), *change]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
