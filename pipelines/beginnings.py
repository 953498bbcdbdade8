"""The picture that a pipeline begins with: img2img, and inpainting where it has a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.checks import check_number
from fastgen.errors import FastgenError
from fastgen.io import file_sha256

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Beginning", "read_beginning"]


@dataclass(frozen=True)
class Beginning:
    """The picture that a search begins with, read and checked.

    Attributes:
        arguments: for the pipeline's call.
        settings: for the sidecar.
    """

    arguments: dict[str, Any]
    settings: dict[str, Any]

    @property
    def begins(self) -> str:
        """For `pipeline_class`."""
        return "mask_image" if self.masked else "image"

    @property
    def masked(self) -> bool:
        """Whether only a part is drawn again."""
        return "mask_image" in self.arguments

    def steps(self, steps: int, default: float | None) -> int:
        """How many of a schedule's steps are left; `default`: the pipeline's own strength."""
        strength = self.arguments.get("strength", default)
        return steps if strength is None else max(1, min(steps, int(steps * strength)))


def read_beginning(
    image: Path | None, mask: Path | None, strength: float | None, label: Callable[[str], str] = str
) -> Beginning | None:
    """Read the files, which needs neither torch nor the model; None: nothing was given.

    Args:
        image, mask: files of pictures.
        strength: how much of the picture may change.
        label: maps an argument's name to its name in the message.

    Raises:
        FastgenError: a mask or a strength without a picture, a file that is no picture, or a strength out of range.
    """
    given = {"image": image, "mask": mask, "strength": strength}
    names = [label(name) for name, value in given.items() if value is not None]
    if not names:
        return None
    if image is None:
        raise FastgenError(f"{names[0]}: needs {label('image')}")
    arguments: dict[str, Any] = {"image": _read(label("image"), image).convert("RGB")}
    settings: dict[str, Any] = {"image": file_sha256(image)[:16], "mask": None, "strength": strength}
    if mask is not None:
        arguments["mask_image"] = _read(label("mask"), mask).convert("L")
        settings["mask"] = file_sha256(mask)[:16]
        if arguments["mask_image"].size != arguments["image"].size:
            sizes = [" x ".join(map(str, arguments[name].size)) for name in ("mask_image", "image")]
            raise FastgenError(
                f"{label('mask')}: {mask} has {sizes[0]} pixels, needs those of {label('image')}, {sizes[1]}"
            )
    if strength is not None:
        arguments["strength"] = check_number(label("strength"), strength, above=0, maximum=1)
    return Beginning(arguments, settings)


def _read(label: str, path: Path) -> Image:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FastgenError(f"{label}: {path} is no picture that can be read: {str(error).splitlines()[0]}") from error
