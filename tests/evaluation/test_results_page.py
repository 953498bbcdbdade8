"""Result JSON as text, and the committed page."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from checker_validation import checker_markdown

from fastgen.evaluation import report, results_page
from fastgen.evaluation.gains import gains_table

WHERE: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789ab",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "cpu": "Some CPU",
    "threads": 2,
    "gpus": [],
}
THREE = {"p20": 1.0, "p50": 2.0, "p80": 3.25}
SCORES: dict[str, Any] = {
    "benchmark": "ShapesWorld-GenEval",
    "tasks": {"colors": {"score": 0.5, "stderr": 0.0625, "n_prompts": 60, "n_images": 240}},
    "overall": 0.5,
    "overall_stderr": 0.0625,
    "n_prompts": 60,
    "n_images": 240,
    "fd_shapes": {"protocol": "FD-shapes[x]", "value": 12.345},
    "settings": {"images_per_prompt": 4, "batch_size": 16},
    "detector": "0123456789abcdef",
    "environment": WHERE,
}
GENERATE: dict[str, Any] = {
    "cold": [{"what": "fastgen generate", "n": 5, "seconds": THREE, "peak_rss_bytes": 500_000_000}],
    "warm": [
        {
            "model": "tiny",
            "engine": "eager",
            "batch": 8,
            "batch_invariant": False,
            "n": 5,
            "seconds_per_image": THREE,
            "seconds_per_step": THREE,
        },
    ],
    "environment": WHERE,
}


def test_provenance_names_the_device() -> None:
    line = report.provenance(SCORES)
    assert line == (
        "Some CPU, 2 threads; python 3.11.7, torch 2.13.0; commit 0123456789ab; detector 01234567; "
        "2026-01-02T03:04:05+00:00"
    )
    gpu = copy.deepcopy(SCORES)
    gpu["environment"]["gpus"] = ["GPU A", "GPU A"]
    assert report.provenance(gpu).startswith("GPU A, GPU A; python")


def test_tables_have_every_row() -> None:
    text = results_page.generate_markdown(GENERATE)
    assert "| fastgen generate | 5 | 1.000 | 2.000 | 3.250 | 500 |" in text
    assert "| tiny | eager | 8 | no | 5 | 1.000 | 2.000 | 3.250 | 2000.0 |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| tiny")}
    assert widths == {10}
    assert "Some CPU" in text


def test_page_shows_what_is_there(tmp_path: Path) -> None:
    assert "##" not in results_page.results_page(tmp_path)
    for name, data in (("shapesworld-tiny", SCORES), ("bench-generate", GENERATE)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    text = results_page.results_page(tmp_path)
    assert "`fastgen eval shapes --model tiny --images-per-prompt 4 --fast-batches --batch-size 16`" in text
    assert "| colors | 50.0 | 6.2 | 60 | 240 |" in text and "FD-shapes[x]: **12.35**" in text
    assert text.count("\n## ") == 2 and "autoregressive" not in text


def test_readme_gets_the_tables_between_their_marks(tmp_path: Path, repository: Path) -> None:
    results = repository / "docs" / "results"
    for path in results.glob("bench-*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "shapesworld-tiny.json").write_text(json.dumps(SCORES))
    before = "# Title\n<!-- gains -->\nstale\n<!-- gains -->\n<!-- scores -->\nstale\n<!-- scores -->\nrest\n"
    after = results_page.with_tables(before, tmp_path)
    assert "| tiny | 50.0 | **50.0** | 6.2 | 12.3 |" in after and "stale" not in after and after.endswith("\nrest\n")
    assert results_page.with_tables(after, tmp_path) == after
    for mark in ("gains", "scores"):
        with pytest.raises(ValueError, match=f"two marks <!-- {mark} -->, found 1"):
            results_page.with_tables(before.replace(f"<!-- {mark} -->", "", 1), tmp_path)


def chunking_row(folder: Path, **rows: tuple[float, float]) -> str:
    """The README's line for chunking, of rows with a score and seconds; "_" stands for a space."""
    records = [
        {"variant": name.replace("_", " "), "score": score, "stderr": 0.01, "seconds": {"p50": seconds}}
        for name, (score, seconds) in rows.items()
    ]
    data = {"settings": {"model": "m", "device": "cpu"}, "environment": {"threads": 1}, "rows": records}
    (folder / "bench-dc.json").write_text(json.dumps(data))
    (line,) = (line for line in gains_table(folder).splitlines() if line.startswith("| dynamic chunking"))
    return line


def test_the_gain_of_chunking_is_its_fastest_row_near_the_dense_model_against_the_best_rival(tmp_path: Path) -> None:
    rivals = {"dense": (0.8, 1.0), "dense_4_steps": (0.5, 0.3), "dense_6_steps": (0.7, 0.5)}
    line = chunking_row(tmp_path, **rivals, dc_0=(0.81, 0.8), dc_late=(0.79, 0.5), dc_more=(0.78, 0.4))
    assert "`dc late` | `m`, 1 CPU thread | 2.00 x the dense model | 79.0 ± 1.0 % correct, " in line
    assert "the dense model 80.0 ± 1.0 %; in no more time, dense 6 steps: 70.0 ± 1.0 %" in line
    # None is near: the best one, whatever it takes.
    line = chunking_row(tmp_path, **rivals, dc_0=(0.6, 1.25), dc_late=(0.5, 0.2))
    assert "`dc 0`" in line and "0.80 x the dense model" in line and "in no more time, dense: 80.0" in line


def test_gains_of_speculative_decoding_are_one_row_a_law(repository: Path) -> None:
    """What is lossy says by how much, with its interval."""
    lines = gains_table(repository / "docs" / "results").splitlines()
    exact, cascade = (next(line for line in lines if f"decoding, `{rule}`" in line) for rule in ("exact", "cascade"))
    assert "same distribution" in exact and "lossy" not in exact
    assert "lossy" in cascade and "points against the plain loop (" in cascade and "95 %, paired by prompt" in cascade


def test_gains_that_were_not_measured_have_no_row(tmp_path: Path) -> None:
    assert "dynamic chunking" not in gains_table(tmp_path)


def test_committed_readme_has_the_committed_numbers(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert results_page.with_tables(text, repository / "docs" / "results") == text


@pytest.mark.parametrize("page", ["results.md", "results/shapes-checker.md"])
def test_committed_pages_are_those_of_the_committed_json(repository: Path, page: str) -> None:
    docs = repository / "docs"
    if page == "results.md":
        expected = results_page.results_page(docs / "results")
    else:
        expected = checker_markdown(json.loads((docs / "results" / "shapes-checker.json").read_text()))
    assert (docs / page).read_text(encoding="utf-8") == expected
