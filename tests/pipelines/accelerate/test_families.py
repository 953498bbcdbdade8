"""`accelerate` on every family of pipelines. The whole is slow and makes the table of docs/accelerate-pipelines.md."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from accelerate_table import DOCUMENT, EXACT, check, line, usable
from long_tail import long_tail
from stock_families import FAMILIES, family

_FEW = ("sdxl", "flux", "sd3", "qwen-image", "sana", "z-image", "pixart-sigma", "hunyuan-dit")


@pytest.mark.parametrize("name", long_tail(_FEW, fast=("sdxl", "flux", "sd3", "z-image", "hunyuan-dit")))
def test_exact_parts_change_no_picture_beyond_rounding_and_restore_everything(name: str) -> None:
    check(name, None)
    check(name, usable(family(name), EXACT))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_that_a_family_has_works_and_leaves_nothing(name: str) -> None:
    """And is in its line of the docs, where the extras are installed."""
    found = line(name)
    if find_spec("torchao") and find_spec("cache_dit"):
        assert found in DOCUMENT.read_text(encoding="utf-8").splitlines()


def test_the_docs_have_a_line_for_each_family() -> None:
    names = [row.split("|")[1].strip() for row in DOCUMENT.read_text().splitlines() if row.startswith("| ")]
    assert names[2:] == list(FAMILIES)
