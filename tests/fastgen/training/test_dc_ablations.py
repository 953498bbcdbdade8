"""`fastgen bench dc-ablations`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastgen.cli.main import run
from fastgen.training.dc_ablations import VARIANTS


def test_rows_of_two_variants(tmp_path: Path, capsys: Any) -> None:
    arguments = ["bench", "dc-ablations", "--folder", str(tmp_path / "f"), "--steps", "2", "--batch-size", "4"]
    arguments += ["--variant", "default", "--variant", "cosine router"]
    assert run([*arguments, "--json", "--out", str(tmp_path / "a.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "a.json").read_text())
    first, second = printed["rows"]
    assert first["variant"] == "default" and second["changes"] == {"router": "cosine"}
    for rho in ("0", "0.3", "0.6"):
        assert first["tail_drops"][rho]["difference"] == 0 and first["tail_drops"][rho]["weighted"] > 0
        assert second["tail_drops"][rho]["difference"] != 0 and second["tail_drops"][rho]["stderr"] > 0
    config = json.loads((tmp_path / "f" / "cosine-router" / "model" / "transformer" / "config.json").read_text())
    assert config["router"] == "cosine"
    # The variants are trained: a second run says the same.
    assert run(arguments) == 0
    assert f"{first['tail_drops']['0']['weighted']:.4f}" in capsys.readouterr().out


def test_every_variant_changes_one_thing() -> None:
    assert [len(changes) for changes in VARIANTS.values()] == [0] + [1] * (len(VARIANTS) - 1)


@pytest.mark.parametrize(("change", "message"), [(["--variant", "none"], "variant"), (["--part", "absent"], "absent")])
def test_bad_arguments(change: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    assert run(["bench", "dc-ablations", "--folder", str(tmp_path), *change]) == 2
    assert message in capsys.readouterr().err
