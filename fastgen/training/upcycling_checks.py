"""Check that a pipeline, its data and a student match, from configuration files and headers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgen.errors import FastgenError
from fastgen.io import read_object
from fastgen.pipelines.loading.checkpoint import Checkpoint
from fastgen.training.pictures import Pictures
from fastgen.training.samples import Samples

__all__ = ["check_data", "check_student", "student_for"]

#: Grid of the students by recipe; other recipes train both.
_GRIDS = {"dc-graft": "latent", "dc-patch": "patch"}
_COPIED = ("in_channels", "dim", "n_layers", "n_heads", "cap_feat_dim", "num_layers", "num_attention_heads")


def student_for(folder: Path, recipe: str) -> dict[str, Any]:
    """The configuration of an upcycled transformer that a recipe can continue from.

    Raises:
        FastgenError: the folder has another model, or one with another grid.
    """
    from fastgen.training.upcycling import student_config

    own = student_config(folder)
    grid, needed = own.get("grid", "latent"), _GRIDS.get(recipe)
    if needed is not None and grid != needed:
        raise FastgenError(f"--init: {folder} has grid {grid!r}, recipe {recipe} needs {needed!r}")
    return own


def check_student(folder: Path, checkpoint: Checkpoint, recipe: str) -> None:
    """Check that a recipe can train the student in a folder with this pipeline as its original.

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
    """Check that the pipeline's transformer can read the data.

    Raises:
        FastgenError: samples with another shape, or pictures for a model other than Z-Image.
    """
    if isinstance(data, Pictures):
        if checkpoint.pipeline_class != "ZImagePipeline":
            raise FastgenError(
                f"--data: {data.path} has pictures; {checkpoint.model} ({checkpoint.pipeline_class}) needs its own "
                "samples"
            )
        return
    channels = _transformer(checkpoint).get("in_channels")
    if len(data.shape) != 3 or channels not in (None, data.shape[0]) or any(side % 2 for side in data.shape[1:]):
        raise FastgenError(
            f"--data: {data.folder} has samples of shape {data.shape}, the transformer of {checkpoint.model} needs "
            f"({channels}, h, w) with even h and w"
        )


def _transformer(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.component("transformer") / "config.json"
    return read_object(path) if path.is_file() else {}
