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

__all__ = ["build_rule", "drafter_class", "heads_beside", "heads_folder", "load_drafter"]

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
# Codes around each code that a rule may look at, as far as the codebook has so many.
_LANTERN_NEAR = 1000


def load_drafter(folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Any:
    """A saved drafter, or heads of a window, whatever its class.

    Args:
        folder: written by `save_pretrained`, or a Hub id of an EAGLE drafter of ours.
        dtype: of the weights; None as stored.

    Raises:
        FastgenError: the folder holds no drafter that we know, or its weights do not fit its configuration.
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
        FastgenError: the folder holds none that we know.
    """
    kind = _kind(Path(folder))
    if kind not in _DRAFTERS:
        raise FastgenError(f"drafter: {os.fspath(folder)} holds none that we know (found {str(kind)[:60]})")
    return _DRAFTERS[kind]


def _kind(folder: Path) -> str | None:
    """The class that a folder's configuration names."""
    path = folder / "config.json"
    found = read_object(path).get("_class_name") if path.is_file() else None
    return found if isinstance(found, str) else None


def heads_folder(folder: str | os.PathLike[str]) -> Path | None:
    """The heads of a window that go with a drafter, if any: in its folder, or next to it in a saved pipeline."""
    places = [Path(folder) / "heads"]
    if Path(folder).name == "drafter" and (Path(folder).parent / "model_index.json").is_file():
        places.append(Path(folder).parent / "heads")
    return next((place for place in places if place.is_dir()), None)


def heads_beside(folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> WindowHeads | None:
    """The heads of `heads_folder`."""
    path = heads_folder(folder)
    return None if path is None else load_drafter(path, dtype)


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
    return Neighbours.known(target.model, codebook, min(near, len(codebook) - 1))
