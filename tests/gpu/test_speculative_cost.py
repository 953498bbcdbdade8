"""Rounds of speculative decoding as CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from fastgen.evaluation.benchmarks import speculative_cost

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_costs_with_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative_cost, "_JANUS", {"janus-pro-1b": (128, 2, 2, 256)})
    data = speculative_cost.benchmark_speculative_cost(["janus-pro-1b"], (1, 4), runs=3, device="cuda")
    assert data["settings"]["compile"] and [row["nodes"] for row in data["sources"]] == [1, 17, 21, 23]
    assert all(row["round"]["p50"] > 0 for row in data["sources"])
