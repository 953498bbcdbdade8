"""`fastgen bench speculative`: its rows, its gate, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen._assets import ROOT
from fastgen.cli.main import run
from fastgen.drafters.calibration import Calibration, Level
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.heads import WindowHeads
from fastgen.drafters.sources import JacobiSource
from fastgen.drafters.targets import target_of
from fastgen.drafters.verify import AcceptedPath
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks import speculative, speculative_cost
from fastgen.evaluation.benchmarks.speculative import benchmark_speculative
from fastgen.evaluation.benchmarks.speculative_cost import SOURCES, measure_target
from fastgen.evaluation.benchmarks.speculative_variants import VARIANTS, default_variants, parse_variant
from fastgen.evaluation.speculative_results import speculative_markdown, speculative_plot
from fastgen.pipelines.janus import JanusImagePipeline

NAMES = ["exact jacobi-4", "lantern jacobi-4 delta=0.5", "exact 2-2", "exact auto", "exact plain"]


@pytest.fixture(scope="module")
def drafter(micro_janus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = JanusImagePipeline.from_pretrained(micro_janus, torch_dtype=torch.float32)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("drafter")
    EagleDrafter.for_target(target_of(pipe.model, pipe.tokenizer), heads=2).save_pretrained(folder)
    return folder


def test_rows_without_scores(
    micro_janus: Path,
    drafter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processes: list[list[str]] = []  # whole commands are what other tests run
    monkeypatch.setattr(speculative, "measure_process", processes.append)
    options = [word for name in NAMES for word in ("--variant", name)]
    command = ["bench", "speculative", "--model", str(micro_janus), "--drafter", str(drafter), *options]
    out = tmp_path / "r.json"
    fixed = ["--no-quality", "--dtype", "float32", "--no-compile", "--json", "--out", str(out)]
    commands = ["--commands", "2"]
    code = run([*command, *fixed, "--timed-prompts", "2", "--runs", "1", "--batch", "1", "--batch", "3", *commands])
    printed = json.loads(capsys.readouterr().out)
    assert code == 0 and printed == json.loads(out.read_text())
    rows = printed["rows"]
    assert [row["variant"] for row in rows] == ["plain loop, float32", "stock generate, float32", *NAMES]
    for row in rows:
        assert row["seconds"]["p50"] > 0 and row["score"] is None
        ratio = rows[0]["seconds"]["p50"] / row["seconds"]["p50"]
        assert row["speedup_vs_fastest_plain"] == pytest.approx(ratio)
    what = [row["what"] for row in printed["commands"]]
    assert len(what) == 2 and what[1] == f"{what[0]} --tree plain" and printed["commands"][0]["n"] == 2
    assert processes[0::2] == 3 * processes[:1] and processes[1] == [*processes[0], "--tree", "plain"]
    exact, lantern, tree, auto, plain = rows[2:]
    assert auto["tree"].startswith(("jacobi-", "auto ", "plain"))
    assert plain["target_pass_ratio"] == 1 and plain["accepted_length"] == 1 and plain["tree"] == "plain"
    for row in (rows[0], *rows[2:]):
        assert set(row["pictures_a_minute"]) == {"1", "3"} and min(row["pictures_a_minute"].values()) > 0
    assert 1 / 4 < exact["target_pass_ratio"] < 1 and exact["accepted_length"] > 1 and exact["stolen"] == 0
    assert lantern["stolen"] > 0 and lantern["accepted_length"] > exact["accepted_length"]
    assert exact["accepted_length"] == pytest.approx(exact["accepted_without_bonus"] + 1)
    assert tree["drafter"] == drafter.name and tree["tree"] == "2-2" and exact["drafter"] == "none (Jacobi)"


def test_variants_name_their_drafter_and_quality(micro_janus: Path) -> None:
    pipe = JanusImagePipeline.from_pretrained(micro_janus, torch_dtype=torch.float32)
    target = target_of(pipe.model, pipe.tokenizer)
    first, second = (EagleDrafter.for_target(target, heads=2) for _ in range(2))
    levels = Calibration((Level(0.5, 0.1, 0.7, 2.0, 0.0, (9, 0, 0)),))
    given = {"a": (first, None), "b": (second, levels)}
    for text, drafter in (("exact 2-1", first), ("exact 2-1@a", first), ("exact 2-1@b", second)):
        variant = parse_variant(text, target, given)
        assert variant.source().drafter is drafter and variant.tree == "2-1"  # type: ignore[attr-defined]
    relaxed = parse_variant("cascade 2-1@b quality=0.5 delta=0.3", target, given).rule
    assert relaxed.config.breadth == 0.7 and relaxed.config.delta == 0.3  # type: ignore[attr-defined]
    for text in ("exact 2-1@c", "cascade 2-1@a quality=0.5", "exact 2-1@b quality=0.5"):
        with pytest.raises(ValueError, match="drafter|quality"):
            parse_variant(text, target, given)


def test_a_wrong_decoder_is_not_timed(micro_janus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgen.drafters import decode

    real = decode.verify_and_walk

    def wrong(*arguments: Any) -> AcceptedPath:
        path = real(*arguments)
        return replace(path, bonus=(path.bonus + 1) % 48)

    monkeypatch.setattr(decode, "verify_and_walk", wrong)
    with pytest.raises(FastgenError, match="exact jacobi-4: other tokens"):
        benchmark_speculative(str(micro_janus), tmp_path, variants=NAMES[:1], quality=False, timed_prompts=1, runs=1)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("exact", "RULE DRAFT"),
        ("exact jacobi-4 fast", "RULE DRAFT"),
        ("exact jacobi-0", "is not a window"),
        ("loose jacobi-4", "loose"),
        ("exact 2-2", "needs a drafter"),
        ("lantern jacobi-4 delta=x", "delta"),
        ("exact jacobi-4 delta=1", "delta"),
    ],
)
def test_bad_variants(micro_janus: Path, text: str, word: str) -> None:
    pipe = JanusImagePipeline.from_pretrained(micro_janus, torch_dtype=torch.float32)
    with pytest.raises(ValueError, match=word):
        parse_variant(text, target_of(pipe.model, pipe.tokenizer))


def test_default_variants_are_those_that_the_model_can_draw(micro_janus: Path) -> None:
    """Of tiny-janus they are all; without heads windows take their place, without a calibration CASCADE has no row."""
    pipe = JanusImagePipeline.from_pretrained(micro_janus, torch_dtype=torch.float32)
    target = target_of(pipe.model, pipe.tokenizer)
    levels = Calibration((Level(0.5, 0.1, 0.7, 2.0, 0.0, (9, 0, 0)),))
    drafters = {"own": (EagleDrafter.for_target(target, heads=2), levels)}
    for places, windows in ((24, {"heads-20", "heads-6", "jacobi-16"}), (5, {"heads-5", "jacobi-16"})):
        heads = WindowHeads.for_target(target, window=places, width=16, heads=2)
        for calibrated in (True, False):
            given = [
                parse_variant(text, target, drafters if calibrated else None, heads=heads)
                for text in default_variants(heads, calibrated)
            ]
            assert {each.rule.name for each in given} == {"exact", "lantern++", "gsd", *["cascade"] * calibrated}
            batch = {"heads-8"} if calibrated and places > 8 else set()
            assert windows | batch == {each.tree for each in given}
        assert (default_variants(heads, True) == VARIANTS) == (places == 24)
    found = default_variants(None, False)
    assert {text.split()[1] for text in default_variants(None, True)} == {"jacobi-16"}
    assert found == ("exact jacobi-16", "lantern++ jacobi-16", "lantern++ jacobi-16 factor=2", "gsd jacobi-16")
    assert all(isinstance(parse_variant(text, target).source(), JacobiSource) for text in found)


def test_default_rows_of_a_model_without_heads(micro_janus: Path, tmp_path: Path) -> None:
    """And the result says which source draws where no tree is given."""
    settings: dict[str, Any] = {"quality": False, "timed_prompts": 1, "runs": 1, "dtype": "float32", "compile": False}
    result = benchmark_speculative(str(micro_janus), tmp_path, **settings)
    assert [row["variant"] for row in result["rows"][2:]] == list(default_variants(None, False))
    assert result["settings"]["default"] == "plain"
    text = speculative_markdown(result)
    assert "Without `--tree`, one picture by `exact` drafts with `plain` here." in text


@pytest.mark.parametrize("name", ["bench-speculative", "bench-speculative-trees"])
def test_the_plot_of_committed_results(repository: Path, tmp_path: Path, name: str) -> None:
    """With few rows and with many, and not without scores."""
    pytest.importorskip("matplotlib")
    data = json.loads((repository / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    speculative_plot(data, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000
    with pytest.raises(FastgenError, match="no scores"):
        speculative_plot({"rows": [{**row, "score": None} for row in data["rows"]]}, tmp_path / "q.png")


def test_bad_numbers(micro_janus: Path, micro_z: Path, tmp_path: Path) -> None:
    with pytest.raises(FastgenError, match="runs"):
        benchmark_speculative(str(micro_janus), tmp_path, runs=0)
    with pytest.raises(FastgenError, match="does not draw tokens"):
        benchmark_speculative(str(micro_z), tmp_path)


def test_costs_and_gains_of_a_small_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real passes and rounds: against the fastest plain loop, padded or not, with the acceptance of tiny-janus."""
    monkeypatch.setattr(speculative_cost, "_JANUS", {"janus-pro-1b": (64, 2, 2, 96)})
    out = tmp_path / "r.json"
    words = ["--size", "janus-pro-1b", "--nodes", "2", "--nodes", "5", "--runs", "2", "--dtype", "float32"]
    assert run(["bench", "speculative-cost", *words, "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    assert data["settings"]["acceptance_of"] == "tiny-janus" and data["settings"]["compile"] is False
    rows, (plain, *sources) = data["rows"], data["sources"]
    assert [row["nodes"] for row in rows] == [1, 2, 5]
    padded = min(row["verify"]["p50"] for row in rows) + rows[0]["left"]["p50"]
    fastest = min(plain["round"]["p50"], padded)
    for row in rows:
        assert min(row[name]["p50"] for name in ("verify", "draft", "left")) > 0
        whole = row["verify"]["p50"] + row["left"]["p50"] + (row["nodes"] - 1) * row["draft"]["p50"]
        assert row["break_even"] == pytest.approx(whole / fastest) and row["break_even"] >= 1.0
    assert (plain["rule"], plain["source"], plain["nodes"], plain["tokens"]) == (None, "plain", 1, 1)
    assert plain["speedup_vs_plain"] == 1 and plain["speedup_vs_fastest_plain"] <= 1
    pace = json.loads((ROOT / "tiny-janus" / "drafter" / "calibration.json").read_text())["pace"]
    assert [(row["rule"], row["source"]) for row in sources] == list(SOURCES)
    for row, nodes in zip(sources, (17, 21, 21), strict=True):
        assert row["nodes"] == nodes and row["tokens"] == pace["tokens"][row["rule"]][row["source"]]
        passes = 24**2 / row["tokens"]
        assert row["seconds_per_picture"] == pytest.approx(passes * row["round"]["p50"])
        assert row["speedup_vs_plain"] == pytest.approx(plain["seconds_per_picture"] / row["seconds_per_picture"])
        assert row["break_even"] * row["speedup_vs_fastest_plain"] == pytest.approx(row["tokens"])
    page = capsys.readouterr().out
    assert "cascade heads-20" in page and "`tiny-janus` accepts, not this model" in page


@pytest.mark.slow
def test_compiled_costs(micro_janus: Path) -> None:
    pipe = JanusImagePipeline.from_pretrained(micro_janus, torch_dtype=torch.float32)
    target = target_of(pipe.model.requires_grad_(False), pipe.tokenizer)
    rows, sources = measure_target(target, (1, 4), runs=1, sources=[("exact", "heads-8")], compile=True)
    assert [row["nodes"] for row in rows] == [1, 4] and [row["source"] for row in sources] == ["plain", "heads-8"]


@pytest.mark.parametrize(("options", "word"), [(["--size", "huge"], "size"), (["--runs", "0"], "runs")])
def test_bad_options_of_the_cost_benchmark(options: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "speculative-cost", *options]) == 2
    assert word in capsys.readouterr().err
