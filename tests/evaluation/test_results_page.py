"""Result JSON as text, and the committed page."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from fastgen.evaluation import report, results_page

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
        {"model": "tiny", "engine": "torch.compile", "batch": 1, "failed": "no compiler"},
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
    assert "| tiny | torch.compile | 1 | failed: no compiler |" in text
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


def test_readme_gets_the_table_between_its_marks(tmp_path: Path) -> None:
    (tmp_path / "shapesworld-tiny.json").write_text(json.dumps(SCORES))
    before = "# Title\n<!-- scores -->\nold\n<!-- scores -->\nrest\n"
    after = results_page.with_scores(before, tmp_path)
    assert "| tiny | 50.0 | **50.0** | 6.2 | 12.3 |" in after and "old" not in after and after.endswith("\nrest\n")
    assert results_page.with_scores(after, tmp_path) == after
    with pytest.raises(ValueError, match="two marks"):
        results_page.with_scores("# Title", tmp_path)


def test_committed_readme_has_the_committed_scores(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert results_page.with_scores(text, repository / "docs" / "results") == text


@pytest.mark.parametrize("page", ["results.md", "results/shapes-checker.md"])
def test_committed_pages_are_those_of_the_committed_json(repository: Path, page: str) -> None:
    docs = repository / "docs"
    if page == "results.md":
        expected = results_page.results_page(docs / "results")
    else:
        expected = results_page.checker_markdown(json.loads((docs / "results" / "shapes-checker.json").read_text()))
    assert (docs / page).read_text(encoding="utf-8") == expected
