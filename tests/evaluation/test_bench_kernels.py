"""The benchmark of kernels: what it measures, and that a wrong kernel gets no speed-up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastgen.cli.bench import app
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks import kernels as module
from fastgen.evaluation.benchmarks.kernel_case import Case, close, equal, noise
from fastgen.evaluation.benchmarks.kernel_cases import cases
from fastgen.evaluation.benchmarks.kernel_timing import time_on_cpu
from fastgen.evaluation.benchmarks.kernels import benchmark_kernels
from fastgen.evaluation.benchmarks.kernels_end_to_end import benchmark_end_to_end
from fastgen.evaluation.kernel_results import kernels_markdown
from fastgen.kernels.dispatch import use_kernels

ON_GPU = torch.cuda.is_available()


def test_every_operation_has_cases_at_large_and_small_sizes() -> None:
    found: dict[str, list[Case]] = {}
    for case in cases():
        found.setdefault(case.op, []).append(case)
    assert {"adaln", "qk_norm_rope", "group_norm_silu"} <= found.keys()
    for op, own in found.items():
        assert len({case.size for case in own}) == len(own), op
        assert any(case.on_cpu for case in own), op


@pytest.mark.parametrize("op", sorted({case.op for case in cases()}))
def test_small_cases_run_by_their_reference(op: str) -> None:
    """Inputs fit the operation, its reference agrees with itself, and something is moved."""
    case = next(case for case in cases() if case.op == op and case.on_cpu)
    inputs = case.build(torch.device("cpu"))
    with use_kernels("reference"), torch.no_grad():
        result, expected = case.run(**inputs), (case.expect or case.reference)(**inputs)
    assert case.check(result, expected) is None
    assert case.moved(inputs) > 0


@pytest.mark.skipif(ON_GPU, reason="of machines without a GPU")
def test_on_a_cpu_only_references_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run = CliRunner().invoke(app, ["kernels", "--op", "adaln", "--no-compile", "--out", str(out), "--json"])
    assert run.exit_code == 0, run.output
    data = json.loads(out.read_text())
    assert json.loads(run.stdout.splitlines()[-1]) == data
    (row,) = data["rows"]
    assert row["check"] == "no GPU" and row["auto"] == "reference"
    assert row["triton"] is row["compiled"] is row["speedup_eager"] is None
    assert row["eager"]["p20"] <= row["eager"]["p50"] <= row["eager"]["p80"]
    assert "| adaln |" in kernels_markdown(data)


def doctored(check: Any, **changes: Any) -> Case:
    """A case whose "kernel" is plain PyTorch, so that it runs anywhere."""
    made = Case(
        "double",
        "1000",
        lambda device: {"x": noise(device, 1000)},
        run=lambda x: x + x,
        reference=lambda x: 2 * x,
        moved=lambda inputs: 4000,
        check=check,
    )
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("case", "verdict"),
    [
        (doctored(close()), "passed"),
        (doctored(close(), run=lambda x: 2.1 * x), "failed: result 0: RMS ratio 0.0"),
        (doctored(close(), run=lambda x: x / 0), "failed: result 0: not finite"),
        (doctored(equal, run=lambda x: (2 * x)[:-1]), "failed: result 0: differs"),
        (doctored(close(), run=lambda x: x.missing), "failed: AttributeError"),
    ],
)
def test_a_wrong_kernel_is_not_timed(case: Case, verdict: str) -> None:
    inputs = case.build(torch.device("cpu"))
    row = {"check": module._check(case, inputs)}
    assert row["check"].startswith(verdict)
    works = module._implementations(case, inputs, row, compile=False)
    assert works.keys() == ({"eager", "triton"} if verdict == "passed" else {"eager"})
    gains = module._speedups(time_on_cpu(works, seconds=0.01))
    assert (gains["speedup_eager"] is not None) == (verdict == "passed")
    assert gains["speedup_compiled"] is None


@pytest.mark.skipif(ON_GPU, reason="of machines without a GPU")
def test_a_run_that_is_cut_off_leaves_its_rows() -> None:
    """After every row, and marked as unfinished until the end."""
    saved: list[tuple[int, bool]] = []
    ops = ["adaln", "qk_norm_rope"]

    def save(result: dict[str, Any]) -> None:
        saved.append((len(result["rows"]), result["finished"]))

    benchmark_kernels(ops, compile=False, save=save)
    assert saved == [(1, False), (2, False), (2, True)]


def test_wrong_requests() -> None:
    with pytest.raises(FastgenError, match="op: 'softmax' is unknown; there are adaln, "):
        benchmark_kernels(["softmax"])
    with pytest.raises(FastgenError, match="--end-to-end: needs a CUDA device, got cpu"):
        benchmark_end_to_end(torch.device("cpu"))
    with pytest.raises(FastgenError, match=r"op: 'adaln' is unknown; there are Janus-Pro-1B, .*, FLUX"):
        benchmark_kernels(["adaln"], end_to_end=True)


def test_models_are_chosen_by_how_their_names_begin() -> None:
    known = ["DC-DiT-XL, 256 tokens", "DiT-XL", "FLUX"]
    assert module._chosen(None, known, True) == known
    assert module._chosen(["FLUX", "D"], known, True) == known
    assert module._chosen(["DiT"], known, True) == ["DiT-XL"]
    with pytest.raises(FastgenError, match="'DiT'"):
        module._chosen(["DiT"], known, False)
