"""The build backend: setuptools, whose editable installs get what type checkers need.

setuptools makes one package of our five folders with an import hook, which mypy and pyright do not run. An editable
install therefore also gets links that make `build/editable/fastgen` the whole package, and that folder on its path.
Where links cannot be made, the hook alone serves.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ROOT = Path(__file__).resolve().parent
FOLDERS = ("drafters", "evaluation", "kernels", "pipelines")


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    try:
        folder = _link_package()
    except OSError:  # a file system or a user without links
        return name
    _add_to_wheel(Path(wheel_directory) / name, "fastgen_diffusers_links.pth", f"{folder}\n".encode())
    return name


def _link_package() -> Path:
    """A folder in which `fastgen` is the whole package. Its links point to folders, so new modules are found too."""
    links = {ROOT / "fastgen" / name: Path("..", name) for name in FOLDERS}
    links[ROOT / "build" / "editable" / "fastgen"] = Path("..", "..", "fastgen")
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(target, target_is_directory=True)
    return ROOT / "build" / "editable"


def _add_to_wheel(wheel: Path, name: str, data: bytes) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    (record,) = (entry for entry in entries if entry.endswith(".dist-info/RECORD"))
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    entries[record] += f"{name},sha256={digest},{len(data)}\n".encode()
    entries[name] = data
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
