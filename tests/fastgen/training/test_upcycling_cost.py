"""The estimate on the page is what its command prints."""

from __future__ import annotations

from pathlib import Path

from fastgen.training.upcycling_cost import estimate, main


def test_the_page_shows_the_table_of_its_command() -> None:
    page = Path(__file__).parents[3] / "docs" / "dynamic-chunking-at-scale.md"
    assert main(["--pictures", "8"]) in page.read_text(encoding="utf-8")


def test_more_gpus_hold_less_each_and_compute_the_same() -> None:
    for few, many in zip(estimate(8, 1e15, 0.4), estimate(16, 1e15, 0.4), strict=True):
        assert few.flops == many.flops and few.hours == many.hours and few.gib > many.gib
