"""Recipes with other settings than the command line offers, for short runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastgen.training.engine import Recipe
from fastgen.training.recipes import RECIPES
from fastgen.training.train_config import TrainConfig


def train_config(name: str, folder: Path, **overrides: Any) -> TrainConfig:
    """A recipe's `TrainConfig` with any of its fields changed."""
    return replace(RECIPES[name]().train_config(folder), **overrides)


def build_recipe(
    name: str,
    seed: int,
    part: Path | None = None,
    init: Path | None = None,
    data: Path | None = None,
    choices: Mapping[str, Any] | None = None,
) -> Recipe:
    """A recipe with those of the settings that are given."""
    settings: dict[str, Any] = {"seed": seed, "part": part, "init": init, "data": data, "set": choices}
    return RECIPES[name](**{key: value for key, value in settings.items() if value is not None}).build()
