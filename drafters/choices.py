"""Results of `tree="auto"` in the user's cache: a small file for each model, sampler, device and version."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgen.drafters.names import check_tree_name
from fastgen.drafters.tree import Tree, static_tree
from fastgen.environment import cpu_name, versions
from fastgen.errors import FastgenError
from fastgen.io import atomic_write_json, read_object, user_cache_dir

__all__ = ["fingerprint", "load_choice", "machine_info", "save_choice"]

_VALUES = 4  # values of each weight in a fingerprint


def fingerprint(network: nn.Module | None) -> str | None:
    """A hash of a network's configuration and a few values of every weight."""
    if network is None:
        return None
    config = getattr(network, "config", None)
    digest = hashlib.sha256(f"{type(network).__name__} {config}".encode())
    for name, weight in network.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if not weight.is_meta and weight.numel():
            digest.update(str(weight.flatten()[:_VALUES].tolist()).encode())
    return digest.hexdigest()[:16]


def machine_info(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that timings depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "versions": versions()}


def load_choice(key: Mapping[str, Any]) -> tuple[str | Tree, str] | None:
    """The source and its name for this key; None if there is none that can be read."""
    path = _path(key)
    if not path.is_file():
        return None
    try:
        found = read_object(path)
        name, paths = found["name"], found["paths"]
        if found["key"] != _plain(key) or not isinstance(name, str):
            raise FastgenError("it belongs to another key")
        if paths is not None:
            return static_tree(paths), name
        check_tree_name("name", name)
        return name, name
    except (FastgenError, KeyError, TypeError, ValueError) as error:
        warnings.warn(f"{path} is ignored, the fastest tree is measured again: {error}", stacklevel=2)
        return None


def save_choice(key: Mapping[str, Any], source: str | Tree, name: str) -> None:
    """Save a source; warn if that is not possible."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        paths = _paths_of(source) if isinstance(source, Tree) else None
        atomic_write_json(path, {"key": _plain(key), "name": name, "paths": paths})
    except (FastgenError, OSError) as error:
        warnings.warn(f"{path} cannot be written, the fastest tree is not saved: {error}", stacklevel=2)


def _plain(key: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(key, default=str))


def _path(key: Mapping[str, Any]) -> Path:
    text = json.dumps(_plain(key), sort_keys=True)
    return user_cache_dir() / "speculative" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _paths_of(tree: Tree) -> list[list[int]]:
    """Rank paths of a static tree."""
    parents, children = tree.parents[0].tolist(), tree.children[0].tolist()
    paths: list[list[int]] = [[]]
    for node in range(1, tree.n):
        parent = parents[node]
        paths.append([*paths[parent], children[parent].index(node)])
    return paths[1:]
