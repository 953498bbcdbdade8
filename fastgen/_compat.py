"""Keeps a torchvision that cannot load its operators from breaking everything else. A leaf.

A torchvision built for another torch (typically: a CUDA build with a CPU torch) fails at import with "operator
torchvision::nms does not exist", and with it `transformers`, `diffusers`, `torchmetrics` and `open_clip`, which look
for torchvision and import it when they find it. All of them need its Python part only. torchvision itself means to
work without its compiled operators (calling one then says so), but registers shapes for two that do not exist; when
those two are declared first, it imports.

The packages of fastgen that import those libraries call `repair_torchvision` first. With a healthy torchvision, or
with none, it changes nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)

_OPERATORS = ("nms", "qnms")
_kept: list[Any] = []  # a torch.library.Library forgets its operators when it is collected


@functools.cache
def repair_torchvision() -> str:
    """Make `import torchvision` work if it is installed.

    Returns:
        "missing", "healthy", "repaired: <why>" (everything but its compiled operators works) or "broken: <why>".
    """
    if "torchvision" in sys.modules:
        return "missing" if sys.modules["torchvision"] is None else "healthy"
    if importlib.util.find_spec("torchvision") is None:
        return "missing"
    try:
        importlib.import_module("torchvision")
        return "healthy"
    except Exception as error:  # no error may stop a package that works without torchvision
        reason = _one_line(error)
    _forget_torchvision()
    if "torchvision::" not in reason:
        return f"broken: {reason}"
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    _kept.append(library)
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        _forget_torchvision()
        return f"broken: {_one_line(error)}"
    logger.info("torchvision was built for another torch (%s); its compiled operators are not available", reason)
    return f"repaired: {reason}"


def _forget_torchvision() -> None:
    """Drop the half-imported package, so that the next import starts over."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
