"""Tail drops and token budgets have one rule, wherever they are given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastgen.errors import FastgenError
from fastgen.models.chunking import select_chunks
from fastgen.models.elastic import ElasticBudget
from fastgen.pipelines.accelerate.tail_drops import TailDrops
from fastgen.pipelines.schema import ChunkingSettings


def settings(**knobs: Any) -> None:
    ChunkingSettings.of(knobs).check_together()


def chunks(**knobs: Any) -> None:
    select_chunks(torch.rand(2, 12), (3, 4), **knobs)


def by_step(**knobs: Any) -> None:
    ElasticBudget(**{name: lambda step, sigma, drop=drop: drop for name, drop in knobs.items()}).of_batch(2, 0.5)


PLACES: list[Callable[..., Any]] = [settings, chunks, by_step, ElasticBudget, TailDrops]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("drop", [1.0, 1.5, -0.1, math.nan, math.inf])
def test_a_tail_drop_is_in_range(place: Callable[..., Any], drop: float) -> None:
    with pytest.raises(FastgenError, match=r"tail_drop.*: .* is not allowed, needs a number >= 0 and < 1$"):
        place(tail_drop=drop)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("drop", [0.0, 0.3, 0.999])
def test_all_in_range_are_taken(place: Callable[..., Any], drop: float) -> None:
    place(tail_drop=drop)


@pytest.mark.parametrize("place", [settings, chunks, ElasticBudget])
@pytest.mark.parametrize("drops", [{"tail_drop": 0.3}, {"tail_drop": [0.3, 0.0]}, {"uncond_tail_drop": 0.0}])
def test_a_budget_stands_alone(place: Callable[..., Any], drops: dict[str, Any]) -> None:
    if place is chunks and "uncond_tail_drop" in drops:
        pytest.skip("it knows no branches")
    with pytest.raises(FastgenError, match="token_budget: cannot be used together with tail_drop or uncond_tail_drop"):
        place(token_budget=3, **drops)
    place(token_budget=3, tail_drop=0.0)
