"""The benchmark of DC-DiT's forward time."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks import dc_speed as bench


def test_rows_have_flops_seconds_and_ratios() -> None:
    result = bench.benchmark_dc_speed(("S",), (1,), (0.0, 0.5), image_size=64, runs=2)
    json.dumps(result)
    dense, full, half = result["rows"]
    assert [row["variant"] for row in result["rows"]] == ["dense", "dc", "dc"]
    assert (full["token_budget"], half["token_budget"]) == (16, 8) and half["flops"] < full["flops"]
    assert dense["flop_ratio"] == dense["time_ratio"] == 1.0
    for row in result["rows"]:
        assert row["n"] == 2 and 0 < row["seconds"]["p20"] <= row["seconds"]["p80"]


def test_z_image_at_a_small_size(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 24}
    monkeypatch.setattr(bench, "Z_IMAGE_CONFIG", {**small, "axes_dims": [4, 6, 6], "axes_lens": [160, 32, 32]})
    result = bench.benchmark_dc_speed(("z-image",), (2,), (0.0,), image_size=64, runs=1, dtype="bfloat16")
    dense, chunked = result["rows"]
    assert dense["variant"] == "dense" and chunked["token_budget"] == 16
    assert 0 < chunked["flops"] != dense["flops"] > 0


def test_no_time_is_taken_of_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose batch differs from its samples alone stops the benchmark."""
    pair = bench._dit("S", 32)
    pair.chunked.eval()
    bench._check(pair, "S")
    forward = pair.chunked.forward

    def wrong(hidden_states: Any, **arguments: Any) -> Any:
        output = forward(hidden_states, **arguments)
        output.sample = output.sample + len(hidden_states)
        return output

    monkeypatch.setattr(pair.chunked, "forward", wrong)
    with pytest.raises(FastgenError, match="differs from its samples computed one by one"):
        bench._check(pair, "S")


def test_the_command(tmp_path: Any, capsys: Any) -> None:
    arguments = ["bench", "dc-speed", "--size", "S", "--batch", "1", "--tail-drop", "0.5", "--image-size", "32"]
    assert run([*arguments, "--runs", "1", "--out", str(tmp_path / "dc.json"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "dc.json").read_text())
    assert [row["variant"] for row in printed["rows"]] == ["dense", "dc"]
    assert run([*arguments, "--runs", "1"]) == 0
    assert "time ratio" in capsys.readouterr().out
    assert run([*arguments, "--runs", "0"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"sizes": ("M",)},
        {"batches": (0,)},
        {"batches": ()},
        {"tail_drops": (1.0,)},
        {"runs": 0},
        {"image_size": 40},
        {"dtype": "int8"},
    ],
)
def test_bad_numbers(bad: dict[str, Any]) -> None:
    with pytest.raises(FastgenError, match=next(iter(bad))):
        bench.benchmark_dc_speed(**bad)
