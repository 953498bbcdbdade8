"""Compilation by default: only where the pictures pay for it by what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generate_command import call as generate
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fastgen
from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.pipelines.accelerate.compile_costs import (
    CompileCosts,
    measured_costs,
    pays_for_compiling,
    remember_costs,
)
from fastgen.pipelines.loading import load_pipeline

CALL = {"height": 16, "width": 16, "steps": 2, "batch_size": 1}
seconds = st.floats(0.01, 100)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@given(first=seconds, compiled=seconds, plain=seconds, pictures=st.integers(1, 1000))
def test_it_pays_where_all_pictures_together_are_drawn_sooner(
    first: float, compiled: float, plain: float, pictures: int
) -> None:
    pays, _ = CompileCosts(first, compiled, plain).pays(pictures)
    with_it, without = max(first, compiled) + (pictures - 1) * compiled, pictures * plain
    assert pays == (with_it < without) or with_it == pytest.approx(without)


def test_costs_are_those_of_one_model_and_one_kind_of_call(micro_z: Path, cache: Path) -> None:
    pipe: Any = load_pipeline(str(micro_z))
    assert pays_for_compiling(pipe, CALL, 10**6) == (
        False,
        "its cost was not measured here: see `fastgen tune --compile`",
    )
    remember_costs(pipe, CALL, CompileCosts(10.0, 1.0, 2.0))
    assert measured_costs(pipe, CALL) == CompileCosts(10.0, 1.0, 2.0)
    assert pays_for_compiling(pipe, CALL, 9)[0] is False and pays_for_compiling(pipe, CALL, 10)[0] is True
    for name in CALL:
        assert measured_costs(pipe, {**CALL, name: 32}) is None
    (file,) = (cache / "compile").iterdir()
    file.write_text('{"format": 1, "first": -1}')
    assert measured_costs(pipe, CALL) is None
    with pytest.raises(FastgenError, match="plain"):
        CompileCosts(1.0, 1.0, 0.0)


def test_too_few_pictures_are_drawn_without_it_and_the_sidecar_says_why(
    micro_z: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remember_costs(load_pipeline(str(micro_z)), CALL, CompileCosts(100.0, 1.0, 2.0))
    size = ["--height", 16, "--width", 16, "--steps", 2, "--batch-size", 1]
    command = ["x", "--model", micro_z, *size, "-o", tmp_path / "a.png", "--accelerate", "exact", "--device", "cpu"]
    assert generate(capsys, *command)[0] == 0
    sidecar = json.loads((tmp_path / "a.json").read_text())
    assert sidecar["loss"] == "exact"
    assert sidecar["stats"]["accelerate"]["compile"] == "measured here: saves 1.0 s for 1 pictures and takes 99.0 s"


@pytest.mark.slow
def test_tune_measures_what_generate_compiles_by(
    micro_z: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, plan = tmp_path / "p.txt", tmp_path / "plan.json"
    prompts.write_text("a red circle\n")
    command = ["tune", "--model", micro_z, "--prompts-file", prompts, "-o", plan, "--prompts", 3, "--steps", 2]
    assert run([*map(str, command), "--loss", "exact", "--compile", "--device", "cpu"]) == 0
    pipe: Any = load_pipeline(str(micro_z))
    call = {"height": 16, "width": 16, "steps": 2, "batch_size": 1}
    costs = measured_costs(pipe, call)
    assert costs is not None and costs.first > costs.compiled
    remember_costs(pipe, call, CompileCosts(2.0, 0.1, 10.0))  # one that pays at once
    here = ["x", "--model", micro_z, "--steps", 2, "--batch-size", 1, "--device", "cpu"]
    assert generate(capsys, *here, "-o", tmp_path / "a.png", "--accelerate", "exact")[0] == 0
    assert generate(capsys, *here, "-o", tmp_path / "b.png", "--accelerate", "off")[0] == 0
    sidecar = json.loads((tmp_path / "a.json").read_text())
    assert sidecar["stats"]["accelerate"]["compile"].startswith("on: measured here") and sidecar["loss"] == "exact"
    ours, plain = (np.asarray(Image.open(tmp_path / name), dtype=int) for name in ("a.png", "b.png"))
    assert np.abs(ours - plain).max() <= 2
    with fastgen.accelerated(pipe, compiling=(True, "")) as made:
        assert "compile" in {part.name for part in made.parts}
