"""Do a pipeline, its data and a student fit each other? By configuration files and headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgen.errors import FastgenError
from fastgen.io import read_object
from fastgen.pipelines.loading.checkpoint import Checkpoint
from fastgen.training.pictures import Pictures
from fastgen.training.samples import Samples

__all__ = ["check_data", "check_student", "student_for"]

#: Recipe -> the grid that its students have; others train both.
_GRIDS = {"dc-graft": "latent", "dc-patch": "patch"}
_COPIED = ("in_channels", "dim", "n_layers", "n_heads", "cap_feat_dim", "num_layers", "num_attention_heads")


def student_for(folder: Path, recipe: str) -> dict[str, Any]:
    """The configuration of an upcycled transformer that a recipe can go on from.

    Raises:
        FastgenError: the folder holds another model, or one of another grid.
    """
    from fastgen.training.upcycling import student_config

    own = student_config(folder)
    grid, needed = own.get("grid", "latent"), _GRIDS.get(recipe)
    if needed is not None and grid != needed:
        raise FastgenError(f"--init: {folder} has grid {grid!r}, recipe {recipe} needs {needed!r}")
    return own


def check_student(folder: Path, checkpoint: Checkpoint, recipe: str) -> None:
    """A student of the folder can be trained by a recipe with this pipeline as its original.

    Raises:
        FastgenError: it has another grid or another shape.
    """
    own, original = student_for(folder, recipe), _transformer(checkpoint)
    for name in _COPIED:
        if name in own and name in original and own[name] != original[name]:
            raise FastgenError(
                f"--init: {folder} has {name} {own[name]}, the transformer of {checkpoint.model} has {original[name]}"
            )


def check_data(data: Samples | Pictures, checkpoint: Checkpoint) -> None:
    """The pipeline's transformer can read the data.

    Raises:
        FastgenError: samples of another shape, or pictures for a model that is no Z-Image.
    """
    if isinstance(data, Pictures):
        if checkpoint.pipeline_class != "ZImagePipeline":
            raise FastgenError(
                f"--data: {data.path} holds pictures; {checkpoint.model} ({checkpoint.pipeline_class}) learns from "
                "its own samples alone"
            )
        return
    channels = _transformer(checkpoint).get("in_channels")
    if len(data.shape) != 3 or channels not in (None, data.shape[0]) or any(side % 2 for side in data.shape[1:]):
        raise FastgenError(
            f"--data: {data.folder} holds samples of shape {data.shape}, the transformer of {checkpoint.model} needs "
            f"({channels}, h, w) with even h and w"
        )


def _transformer(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.component("transformer") / "config.json"
    return read_object(path) if path.is_file() else {}
