"""Drafters and acceptance rules by name."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fastgen.drafters.acceptance import GSD, AcceptanceRule, Block, CoolSD, Exact, Lantern, Neighbours
from fastgen.drafters.cascade import Cascade, CascadeConfig
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.medusa import MedusaDrafter
from fastgen.drafters.names import RULES
from fastgen.drafters.targets import Target

__all__ = ["build_rule", "load_drafter"]

_DRAFTERS = {kind.__name__: kind for kind in (EagleDrafter, MedusaDrafter)}
# Codes around each code that a rule may look at, as far as the codebook has so many.
_LANTERN_NEAR = 1000


def load_drafter(folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Any:
    """A saved drafter, whatever its class.

    Args:
        folder: written by `save_pretrained`, or a Hub id of an EAGLE drafter of ours.
        dtype: of the weights; None as stored.

    Raises:
        ValueError: the folder holds no drafter that we know.
    """
    path = Path(folder) / "config.json"
    if Path(folder).is_dir():
        kind = json.loads(path.read_text(encoding="utf-8")).get("_class_name") if path.is_file() else None
        if kind not in _DRAFTERS:
            raise ValueError(f"drafter: {os.fspath(folder)} holds none that we know (found {kind})")
    else:
        kind = EagleDrafter.__name__
    return _DRAFTERS[kind].from_pretrained(os.fspath(folder), torch_dtype=dtype).eval()


def build_rule(name: str, target: Target, **settings: Any) -> AcceptanceRule:
    """An acceptance rule for a target.

    Args:
        name: one of `RULES`.
        target: for its codebook.
        settings: of the rule; see its class.

    Raises:
        ValueError: unknown rule, or a setting that it does not have.
    """
    if name not in RULES:
        raise ValueError(f"acceptance: {name!r} is unknown; there are {', '.join(RULES)}")
    codes = len(target.codebook)
    try:
        if name == "exact":
            return Exact(**settings)
        if name == "block":
            return Block(**settings)
        if name == "cool-sd":
            return CoolSD(**settings)
        if name == "gsd":
            return GSD(target.codebook, **settings)
        if name == "cascade":
            known = {field.name for field in fields(CascadeConfig)}
            if unknown := sorted(set(settings) - known):
                raise TypeError(f"{unknown[0]!r}")
            config = CascadeConfig(**settings)
            near = Neighbours.of(target.codebook, min(config.near, codes - 1)) if config.radius > 0 else None
            return Cascade(config, near)
        if name == "lantern++":
            settings = {"delta": 1.0, "factor": 5.0, "k": 10, **settings}
        near = Neighbours.of(target.codebook, min(settings.get("k", _LANTERN_NEAR), codes - 1))
        return Lantern(near, **settings)
    except TypeError as error:
        raise ValueError(f"acceptance: {name} does not have the setting {error}") from error
