"""Drafters and acceptance rules by name."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch

from fastgen.drafters.acceptance import GSD, AcceptanceRule, Block, CoolSD, Exact, Lantern, Neighbours
from fastgen.drafters.cascade import Cascade, CascadeConfig
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.heads import WindowHeads
from fastgen.drafters.medusa import MedusaDrafter
from fastgen.drafters.names import RULES
from fastgen.drafters.targets import Target
from fastgen.errors import FastgenError
from fastgen.io import read_object
from fastgen.pretrained import load_pretrained

__all__ = ["build_rule", "drafter_class", "load_heads", "heads_folder", "load_drafter"]

_KINDS: dict[str, Any] = {
    "exact": Exact,
    "block": Block,
    "lantern": Lantern,
    "lantern++": Lantern,
    "gsd": GSD,
    "cool-sd": CoolSD,
    "cascade": CascadeConfig,
}
_DRAFTERS = {kind.__name__: kind for kind in (EagleDrafter, MedusaDrafter, WindowHeads)}
# Nearest codes per code that a rule may use, at most those in the codebook.
_LANTERN_NEAR = 1000


def load_drafter(folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Any:
    """Load a saved drafter, or heads of a window, whatever its class.

    Args:
        folder: written by `save_pretrained`, or the Hub id of an EAGLE drafter in our format.
        dtype: of the weights; None as stored.

    Raises:
        FastgenError: the folder has no known drafter, or its weights do not match its configuration.
    """
    kind = drafter_class(folder) if Path(folder).is_dir() else EagleDrafter
    drafter, info = load_pretrained(kind, os.fspath(folder), torch_dtype=dtype, output_loading_info=True)
    for fault in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, info.get(f"{fault}_keys") or ())):
            raise FastgenError(f"drafter {os.fspath(folder)} has {len(keys)} {fault} weights, e.g. {keys[0]!r}")
    return drafter.eval()


def drafter_class(folder: str | os.PathLike[str]) -> Any:
    """The class of the drafter, or of the heads, in a folder.

    Raises:
        FastgenError: the folder has no known one.
    """
    kind = _kind(Path(folder))
    if kind not in _DRAFTERS:
        raise FastgenError(f"drafter: {os.fspath(folder)} has no known drafter (found {str(kind)[:60]})")
    return _DRAFTERS[kind]


def _kind(folder: Path) -> str | None:
    """The class that a folder's configuration names."""
    path = folder / "config.json"
    found = read_object(path).get("_class_name") if path.is_file() else None
    return found if isinstance(found, str) else None


def heads_folder(folder: str | os.PathLike[str]) -> Path | None:
    """The folder of a drafter's window heads: in its own folder, or next to it in a saved pipeline; None without."""
    places = [Path(folder) / "heads"]
    if Path(folder).name == "drafter" and (Path(folder).parent / "model_index.json").is_file():
        places.append(Path(folder).parent / "heads")
    return next((place for place in places if place.is_dir()), None)


def load_heads(folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> WindowHeads | None:
    """Load the heads in `heads_folder`; None if there are none."""
    path = heads_folder(folder)
    return None if path is None else load_drafter(path, dtype)


def build_rule(name: str, target: Target, **settings: Any) -> AcceptanceRule:
    """An acceptance rule for a target.

    Args:
        name: one of `RULES`.
        target: for its codebook.
        settings: of the rule; see its class.

    Raises:
        ValueError: an unknown rule or setting.
    """
    if name not in RULES:
        raise ValueError(f"acceptance: {name!r} is unknown; there are {', '.join(RULES)}")
    known = [name for name in inspect.signature(_KINDS[name]).parameters if name not in ("neighbours", "codebook")]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"acceptance: {name} has no setting {unknown[0]}; it has {', '.join(known) or 'none'}")
    if name == "gsd":
        return GSD(target.codebook, **settings)
    if name == "cascade":
        config = CascadeConfig(**settings)
        return Cascade(config, _neighbours(target, config.near) if config.radius > 0 else None)
    if name in ("lantern", "lantern++"):
        if name == "lantern++":
            settings = {"delta": 1.0, "factor": 5.0, "k": 10, **settings}
        return Lantern(_neighbours(target, settings.get("k", _LANTERN_NEAR)), **settings)
    rule: AcceptanceRule = _KINDS[name](**settings)
    return rule


def _neighbours(target: Target, near: int) -> Neighbours:
    codebook = target.codebook
    return Neighbours.cached(target.model, codebook, min(near, len(codebook) - 1))
