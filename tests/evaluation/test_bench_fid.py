"""`fastgen bench fid`, and the memory of the metrics at their real size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks import fid
from fastgen.evaluation.benchmarks.fid import benchmark_fid, compute_metrics, fid_markdown


@pytest.mark.slow
def test_statistics_cost_little_beside_the_network() -> None:
    """The sums of a batch take 0.2 % of the network's arithmetic; a loaded machine shows up to a few percent."""
    found = fid._statistics(4, 2, "cpu")
    assert found["network_share"] >= 0.95


def test_metrics_of_random_features() -> None:
    found = compute_metrics(400, 300, dims=1008)
    assert found["fid"] > 0 and found["stderr"] > 0 and found["is"] == pytest.approx(1.04, abs=0.05)
    assert abs(found["kid"]) < 0.1 and 0.2 < found["precision"] <= 1 and 0.2 < found["recall"] <= 1


def test_bad_numbers_are_refused() -> None:
    for bad in ({"images": 0}, {"batch_size": 0}, {"runs": 0}, {"processes": ()}):
        with pytest.raises(FastgenError, match=next(iter(bad))):
            benchmark_fid(**bad)


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--images", "32", "--batch-size", "8", "--runs", "2", "--features", "2500", "--reference", "2200"]
    assert run(["bench", "fid", *options, "--out", str(tmp_path / "x.json"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads((tmp_path / "x.json").read_text())
    assert [row["processes"] for row in data["processes"]] == [1, 2]
    assert data["memory"]["peak_bytes"] > data["memory"]["start_bytes"] > 0
    text = fid_markdown(data)
    assert "% of the network's speed" in text and "GB at the peak" in text


@pytest.mark.slow
def test_fifty_thousand_features_fit_into_a_gigabyte_and_a_half() -> None:
    memory = fid._memory(50_000, 10_000, 5_000)
    assert memory["peak_bytes"] - memory["start_bytes"] < 1e9
    if torch.version.cuda is None:  # importing a torch with CUDA takes half a gigabyte more
        assert memory["peak_bytes"] < 1.5e9
