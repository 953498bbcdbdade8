"""The benchmark of DC-DiT's forward time."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks import dc as bench


def test_rows_have_flops_seconds_and_ratios() -> None:
    result = bench.benchmark_dc_speed(("S",), (1,), (0.0, 0.5), image_size=64, runs=2)
    json.dumps(result)
    dense, full, half = result["rows"]
    assert [row["variant"] for row in result["rows"]] == ["dense", "dc", "dc"]
    assert (full["token_budget"], half["token_budget"]) == (16, 8) and half["flops"] < full["flops"]
    assert dense["flop_ratio"] == dense["time_ratio"] == 1.0
    for row in result["rows"]:
        assert row["n"] == 2 and 0 < row["seconds"]["p20"] <= row["seconds"]["p80"]


def test_no_time_is_taken_of_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose batch differs from its samples alone stops the benchmark."""
    model = bench.DCDiTTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=16, sample_size=4, num_classes=1000
    ).eval()
    bench._check(model, "S")
    forward = model.forward

    def wrong(latents: Any, *arguments: Any, **knobs: Any) -> Any:
        output = forward(latents, *arguments, **knobs)
        output.sample = output.sample + len(latents)
        return output

    monkeypatch.setattr(model, "forward", wrong)
    with pytest.raises(FastgenError, match="differs from its samples alone"):
        bench._check(model, "S")


@pytest.mark.parametrize(
    "bad", [{"sizes": ("M",)}, {"batches": (0,)}, {"batches": ()}, {"tail_drops": (1.0,)}, {"runs": 0}]
)
def test_bad_numbers(bad: dict[str, Any]) -> None:
    with pytest.raises(FastgenError, match=next(iter(bad))):
        bench.benchmark_dc_speed(**bad)
