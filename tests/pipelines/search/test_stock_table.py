"""Every family of pipelines: evaluations of a search, put together, are the stock picture; the docs' table says so."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from long_tail import long_tail
from stock_families import FAMILIES, family
from stock_table import BETWEEN, DIMENSIONS, DOCUMENT, HEAD, PROMPTS, REFUSED, call_of, errors, made, stock, table

from fastgen import NoiseSearchPipeline
from fastgen.pipelines.search.denoisers.base import denoiser_of

#: One dimension for each family by default, all of them behind the slow marker.
SPREAD = [(name, DIMENSIONS[place % len(DIMENSIONS)]) for place, name in enumerate(FAMILIES)]
#: Kinds of pipelines that many families have; by default one family stands for each.
STANDS_FOR = {"inpaint": "flux-inpaint", "controlnet": "sd3-controlnet", "pag": "sdxl-pag"}
ONE_OF_EACH = [pair for pair in SPREAD if STANDS_FOR.get(pair[0].rpartition("-")[2], pair[0]) == pair[0]]
FAST = ONE_OF_EACH[::2]
ALL = [(name, dimension) for name in FAMILIES for dimension in DIMENSIONS if (name, dimension) not in SPREAD]


def check(name: str, dimension: str) -> None:
    if dimension == "callback":
        check_callback(name)
        return
    for found, allowed in errors(name, dimension):
        assert found <= allowed


def check_callback(name: str) -> None:
    """The stock call's without a policy, refused in a search."""
    pipe, call = family(name), call_of(name, "callback")
    if call is None:
        return
    seen: list[int] = []

    def note(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return given

    torch.manual_seed(0)
    plain = stock(pipe, PROMPTS[0], 3, call)
    torch.manual_seed(0)
    off = NoiseSearchPipeline(pipe, policy=None)
    wrapped = stock(off, PROMPTS[0], 3, {"pipeline_kwargs": {**call, "callback_on_step_end": note}})
    assert torch.equal(plain, wrapped) and seen == list(range(len(seen))) and seen
    with pytest.raises(ValueError, match="^callback_on_step_end: a search of"):
        made(pipe, PROMPTS[:1], {**call, "callback_on_step_end": note})


@pytest.mark.parametrize("pair", long_tail(SPREAD, fast=FAST), ids="-".join)
def test_evaluations_make_the_stock_picture(pair: tuple[str, str]) -> None:
    check(*pair)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dimension"), ALL)
def test_evaluations_make_the_stock_picture_in_all_dimensions(name: str, dimension: str) -> None:
    check(name, dimension)


def test_the_page_in_the_docs_has_the_text_of_the_table() -> None:
    page = DOCUMENT.read_text()
    assert page.startswith(HEAD) and BETWEEN in page
    assert [row.split("|")[1].strip() for row in page[len(HEAD) : page.index(BETWEEN)].splitlines()[1:]] == list(
        FAMILIES
    )


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_was_tried() -> None:
    assert DOCUMENT.read_text() == table()
    assert len(FAMILIES) >= 60


@pytest.mark.parametrize("name", REFUSED)
def test_classes_without_start_noise_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^pipe: {name} cannot be searched: its start noise was not found"):
        denoiser_of(getattr(diffusers, name))
