"""The adapters that come with fastgen; they register themselves when they are imported."""

from __future__ import annotations

import importlib

__all__ = ["load"]

MODULES = ("dit", "z_image")


def load() -> None:
    """Import all of them."""
    for module in MODULES:
        importlib.import_module(f"{__package__}.{module}")
