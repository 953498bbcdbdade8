"""The benchmark of DC-DiT's forward time."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks import dc_speed as bench
from fastgen.evaluation.benchmarks.dc_blocks import Parts
from fastgen.evaluation.dc_results import dc_markdown

MICRO = {"dim": 32, "n_layers": 5, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 24}
MICRO = {**MICRO, "axes_dims": [4, 6, 6], "axes_lens": [160, 32, 32]}


def test_rows_have_flops_seconds_and_ratios() -> None:
    result = bench.benchmark_dc_speed(("S@64",), (1,), (1.0, 0.5), runs=2, compile=False, dtype="float32")
    json.dumps(result)
    dense, fused, full, half = result["rows"]
    assert [row["variant"] for row in result["rows"]] == ["dense", "dense, our kernels", "chunked", "chunked"]
    assert (full["token_budget"], half["token_budget"]) == (16, 8) and half["flops"] < full["flops"]
    assert dense["flop_ratio"] == dense["time_ratio"] == dense["efficiency"] == 1.0
    assert fused["missing"] == "Triton needs a GPU" and "seconds" not in fused
    for row in (dense, full, half):
        assert row["n"] == 2 and 0 < row["seconds"]["p20"] <= row["seconds"]["p80"]
        assert row["efficiency"] == pytest.approx(row["flop_ratio"] / row["time_ratio"])
    table = dc_markdown(result)
    assert "Extrapolated: one block of each kind" in table and "not measured: Triton needs a GPU" in table


@pytest.mark.parametrize(("size", "batch"), [("z-image@128", 1), ("z-image@128", 2), ("S@64", 2)])
def test_blocks_scaled_to_the_depth_have_the_flops_of_the_whole_model(
    size: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "Z_IMAGE_CONFIG", MICRO)
    settings: Any = {"runs": 1, "compile": False, "dtype": "float32"}
    results = [bench.benchmark_dc_speed((size,), (batch,), whole=whole, **settings) for whole in (False, True)]
    scaled, whole = ([row.get("flops") for row in result["rows"]] for result in results)
    assert scaled == whole and scaled[0] > scaled[2] > scaled[3]
    assert [result["settings"]["extrapolated"] for result in results] == [True, False]


def test_seconds_are_scaled_to_the_depth() -> None:
    parts = Parts({"layers": 5, "last_layers": 1}, flops={"": 7, "layers": 100, "last_layers": 300})
    assert parts.total_flops() == 7 + 5 * 100 + 300
    assert parts.total_seconds({"": 1.0, "layers": 2.0}, 0.01) == pytest.approx(1 + 5 * 2 + 300 * 0.01)


def test_what_would_take_too_long_is_left_out_with_the_reason() -> None:
    result = bench.benchmark_dc_speed(("S@64",), runs=9, seconds=0.0, dtype="float32")
    assert [row.get("n") for row in result["rows"]] == [1, None, 1, 1, None, None, None]
    missing = {row["variant"]: row["missing"] for row in result["rows"] if "missing" in row}
    assert "left out above 0 s" in missing["dense, compiled"] and "chunked, compiled" in missing


@pytest.mark.slow
def test_compiled_blocks_are_measured_too() -> None:
    result = bench.benchmark_dc_speed(("S@64",), (1,), (0.5,), runs=1, seconds=600.0, dtype="float32")
    dense, _, chunked, *compiled = result["rows"]
    assert [row["variant"] for row in compiled] == ["dense, compiled", "chunked, compiled"]
    assert [row["flops"] for row in compiled] == [dense["flops"], chunked["flops"]]


def test_no_time_is_taken_of_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose batch differs from its samples alone stops the benchmark."""
    pair = bench._dit("S", 32, False)
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
    arguments = ["bench", "dc-speed", "--size", "S@32", "--batch", "1", "--share", "0.5", "--no-compile"]
    assert run([*arguments, "--runs", "1", "--out", str(tmp_path / "dc.json"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "dc.json").read_text())
    assert [row["variant"] for row in printed["rows"]] == ["dense", "dense, our kernels", "chunked"]
    assert run([*arguments, "--runs", "1"]) == 0
    assert "time ratio" in capsys.readouterr().out
    assert run([*arguments, "--runs", "0"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"sizes": ("M@64",)},
        {"sizes": ("S",)},
        {"sizes": ("S@40",)},
        {"batches": (0,)},
        {"batches": ()},
        {"shares": (0.0,)},
        {"shares": ()},
        {"runs": 0},
        {"seconds": -1},
        {"dtype": "int8"},
    ],
)
def test_bad_numbers(bad: dict[str, Any]) -> None:
    with pytest.raises(FastgenError, match=next(iter(bad))):
        bench.benchmark_dc_speed(**bad)
