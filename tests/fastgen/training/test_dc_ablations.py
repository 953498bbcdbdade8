"""`fastgen bench dc-ablations`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastgen.cli.main import run
from fastgen.training.dc_ablations import VARIANTS


@pytest.mark.slow
def test_rows_of_two_variants(tmp_path: Path, capsys: Any) -> None:
    arguments = ["bench", "dc-ablations", "--folder", str(tmp_path / "f"), "--steps", "2", "--batch-size", "4"]
    arguments += ["--renders", "4"]
    arguments += ["--variant", "default", "--variant", "cosine router", "--variant", "dense"]
    assert run([*arguments, "--json", "--out", str(tmp_path / "a.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "a.json").read_text())
    first, second, dense = printed["rows"]
    assert dense["kept"] is None and list(dense["tail_drops"]) == ["0"] and dense["flops"] != first["flops"]
    assert first["variant"] == "default" and second["changes"] == {"router": "cosine"}
    for rho in ("0", "0.3", "0.6"):
        assert first["tail_drops"][rho]["difference"] == 0 and first["tail_drops"][rho]["weighted"] > 0
        assert second["tail_drops"][rho]["difference"] != 0 and second["tail_drops"][rho]["stderr"] > 0
    config = json.loads((tmp_path / "f" / "cosine-router" / "model" / "transformer" / "config.json").read_text())
    assert config["router"] == "cosine"
    # The variants are trained: a second run says the same.
    assert run(arguments) == 0
    assert f"{first['tail_drops']['0']['weighted']:.4f}" in capsys.readouterr().out


def test_the_default_changes_nothing_and_the_others_differ() -> None:
    changes = [json.dumps(change) for change in VARIANTS.values()]
    assert changes[0] == "{}" and len(set(changes)) == len(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--variant", "none"], "variant"),
        (["--variant", "dense"], "cannot be the first"),
        (["--renders", "0"], "renders"),
        (["--part", "absent"], "ab"),
    ],
)
def test_bad_arguments(change: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    assert run(["bench", "dc-ablations", "--folder", str(tmp_path), *change]) == 2
    assert message in capsys.readouterr().err
