"""Checks of a model, its drafter, its heads and their calibration before any weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgen.drafters.calibration import Calibration
from fastgen.drafters.heads import WindowHeads
from fastgen.drafters.loading import heads_folder
from fastgen.drafters.names import tree_widths, window_of
from fastgen.errors import FastgenError
from fastgen.io import read_object
from fastgen.pipelines.loading.checkpoint import Checkpoint

__all__ = ["check_speculative_files"]


def check_speculative_files(checkpoint: Checkpoint, folder: Path | None, tree: str | None, quality: object) -> None:
    """Refuse parts of another model, and a tree or a quality that they do not serve.

    Args:
        checkpoint: of the model.
        folder: of its drafter; None for none.
        tree: by name, or None.
        quality: of acceptance "cascade", or None.

    Raises:
        FastgenError: names the part or the argument, and the mismatch.
    """
    wanted = _numbers(checkpoint)
    places = [] if folder is None else [folder, heads_folder(folder)]
    heads: dict[str, Any] = {}
    for place in filter(None, places):
        config = read_object(place / "config.json")
        if config.get("_class_name") == WindowHeads.__name__:
            heads = config
        label = "heads" if heads is config else "drafter"
        for name, value in wanted.items():
            if name in config and config[name] != value:
                raise FastgenError(
                    f"{label} {place}: made for a model of {name} {config[name]}, {checkpoint.model} has {value}"
                )
    calibration = None if folder is None else Calibration.for_drafter(folder)
    if calibration is not None:
        calibration.check(wanted, f"calibration of {folder}")
    if quality is not None and calibration is None:
        raise FastgenError("--quality: needs a drafter with a calibration (`fastgen train cascade-calibrate`)")
    if tree is None or tree in ("auto", "plain"):
        return
    if tree_widths(tree) is not None:
        if folder is None:
            raise FastgenError(f"--tree: {tree!r} needs a drafter; without one there are windows such as jacobi-12")
        return
    if tree.startswith("heads-") and not heads:
        raise FastgenError(f"--tree: {tree!r} needs heads of this model; train them with `fastgen train heads`")
    places_asked, tokens = window_of(tree)[0], wanted.get("num_tokens")
    if tokens is not None and places_asked > tokens:
        raise FastgenError(f"--tree: {tree!r} is longer than a picture of {tokens} tokens")
    if tree.startswith("heads-") and places_asked > heads.get("window", places_asked):
        raise FastgenError(f"--tree: {tree!r} is too long, these heads correct up to {heads['window']} places")


def _numbers(checkpoint: Checkpoint) -> dict[str, int]:
    """What drafters keep of a model, and its tokens of a picture, as far as its configuration says."""
    path = checkpoint.folder / "config.json"
    config = read_object(path) if path.is_file() else {}
    spots = {
        "hidden_size": ("text_config", "hidden_size"),
        "target_layers": ("text_config", "num_hidden_layers"),
        "vocab_size": ("vq_config", "num_embeddings"),
        "num_tokens": ("vision_config", "num_image_tokens"),
    }
    parts = {part: config[part] for part, _ in spots.values() if isinstance(config.get(part), dict)}
    found = {name: parts.get(part, {}).get(key) for name, (part, key) in spots.items()}
    return {name: value for name, value in found.items() if isinstance(value, int)}
