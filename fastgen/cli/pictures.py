"""`--image`, `--mask` and `--strength` of a search: the picture that it begins with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.errors import FastgenError
from fastgen.io import file_sha256

if TYPE_CHECKING:
    from PIL.Image import Image

ImageOption = Annotated[
    Path | None, typer.Option("--image", help="A picture to begin with, img2img (search).", show_default=False)
]
MaskOption = Annotated[
    Path | None,
    typer.Option("--mask", help="White where --image is to be drawn again, inpainting (search).", show_default=False),
]
StrengthOption = Annotated[
    float | None,
    typer.Option(
        help="How much of --image may change, above 0 to 1. Default: the pipeline's (search).", show_default=False
    ),
]


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
    def masked(self) -> bool:
        """Whether only a part is drawn again."""
        return "mask_image" in self.arguments

    def steps(self, steps: int, default: float | None) -> int:
        """How many of a schedule's steps are left; `default`: the pipeline's own strength."""
        strength = self.arguments.get("strength", default)
        return steps if strength is None else max(1, min(steps, int(steps * strength)))


def read_beginning(
    method: str | None, image: Path | None, mask: Path | None, strength: float | None
) -> Beginning | None:
    """Read the files, which needs neither torch nor the model; None: nothing was given.

    Raises:
        FastgenError: an option without the one that it needs, a file that is no picture, or a strength out of range.
    """
    from fastgen.checks import check_number

    given = {"--image": image, "--mask": mask, "--strength": strength}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return None
    if method != "search":
        raise FastgenError(f"{names[0]}: needs --method search")
    if image is None:
        raise FastgenError(f"{names[0]}: needs --image")
    arguments: dict[str, Any] = {"image": _read("--image", image).convert("RGB")}
    settings: dict[str, Any] = {"image": file_sha256(image)[:16], "mask": None, "strength": strength}
    if mask is not None:
        arguments["mask_image"] = _read("--mask", mask).convert("L")
        settings["mask"] = file_sha256(mask)[:16]
        if arguments["mask_image"].size != arguments["image"].size:
            sizes = [" x ".join(map(str, arguments[name].size)) for name in ("mask_image", "image")]
            raise FastgenError(f"--mask: {mask} has {sizes[0]} pixels, needs those of --image, {sizes[1]}")
    if strength is not None:
        arguments["strength"] = check_number("--strength", strength, above=0, maximum=1)
    return Beginning(arguments, settings)


def _read(option: str, path: Path) -> Image:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FastgenError(f"{option}: {path} is no picture that can be read: {str(error).splitlines()[0]}") from error
