"""`--image`, `--mask` and `--strength` of a search: the picture that it begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastgen.cli.options import option_name
from fastgen.errors import FastgenError
from fastgen.pipelines.beginnings import Beginning, read_beginning

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


def beginning_of(
    method: str | None, image: Path | None, mask: Path | None, strength: float | None
) -> Beginning | None:
    """What these options ask for.

    Raises:
        FastgenError: without a search, or what `read_beginning` refuses.
    """
    given = {"image": image, "mask": mask, "strength": strength}
    names = [option_name(name) for name, value in given.items() if value is not None]
    if names and method != "search":
        raise FastgenError(f"{names[0]}: needs --method search")
    return read_beginning(image, mask, strength, option_name)
