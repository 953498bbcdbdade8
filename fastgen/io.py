"""Atomic files: a reader sees the old file or the new one, never a part. A leaf: imports only the standard library.

Every write goes to a hidden temporary file in the target's own folder, is flushed to the disk and then renamed over
the target. Whatever goes wrong before the rename (disk full, Ctrl-C, an unwritable folder) removes the temporary
file and leaves the target as it was. An `OSError` becomes one `FastgenError` line that names the target.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.errors import FastgenError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "atomic_write_bytes",
    "atomic_write_json",
    "atomic_write_many",
    "check_writable",
    "encode_json",
    "encode_png",
    "file_sha256",
    "read_json",
    "remove_leftovers",
    "save_png",
]

_PathLike = str | os.PathLike[str]

_REASONS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the size limit allows",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENOENT: "the folder does not exist",
    errno.ENAMETOOLONG: "the name is too long",
}


def atomic_write_bytes(path: _PathLike, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all. An existing file is replaced.

    Raises:
        FastgenError: the file cannot be written (the message says why); `path` is left as it was.
    """
    atomic_write_many([(path, data)])


def atomic_write_many(files: Iterable[tuple[_PathLike, bytes]]) -> None:
    """Write several files that belong together, e.g. a picture and its sidecar.

    All of them are on the disk under temporary names before the first one is renamed, so a full disk spares every
    target. The renames follow in the given order: put the file whose presence means "finished" last.

    Raises:
        FastgenError: as `atomic_write_bytes`.
    """
    staged: list[tuple[Path, Path]] = []
    target = Path()
    try:
        for path, data in files:
            target = _resolve_target(path)
            temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
            # Listed before it exists, so that an interrupt at any point finds it and removes it.
            staged.append((temporary, target))
            _write_synced(temporary, data)
        for temporary, target in staged:
            os.replace(temporary, target)
        for folder in {target.parent for _, target in staged}:
            _sync_folder(folder)
    except OSError as error:
        raise FastgenError(f"cannot write {target}: {_reason(error)}") from error
    finally:
        for temporary, _ in staged:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def remove_leftovers(folder: _PathLike) -> None:
    """Remove what writes into `folder`, and into those in it, left when their process was killed.

    Nobody else may be writing there.
    """
    for path in Path(folder).rglob(".*.tmp"):
        if re.fullmatch(r"\..+\.[0-9a-f]{12}\.tmp", path.name):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def atomic_write_json(path: _PathLike, obj: Any) -> None:
    """Write `obj` as indented UTF-8 JSON, atomically.

    Raises:
        FastgenError: as `atomic_write_bytes`.
        ValueError: `obj` contains NaN or infinity, which JSON cannot hold.
        TypeError: `obj` is not made of dict, list, str, numbers, bool and None.
    """
    atomic_write_bytes(path, encode_json(obj))


def save_png(path: _PathLike, image: Image, metadata: Mapping[str, str] | None = None) -> None:
    """Write a PIL image as PNG, atomically; `metadata` becomes PNG text chunks.

    Raises:
        FastgenError: as `atomic_write_bytes`.
    """
    atomic_write_bytes(path, encode_png(image, metadata))


def encode_json(obj: Any) -> bytes:
    """`obj` as the bytes that `atomic_write_json` writes."""
    return (json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def encode_png(image: Image, metadata: Mapping[str, str] | None = None) -> bytes:
    """`image` as PNG bytes. The same image and metadata give the same bytes."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def read_json(path: _PathLike) -> Any:
    """Parse a UTF-8 JSON file.

    Raises:
        FastgenError: the file cannot be read or is not JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FastgenError(f"cannot read {path}: {_reason(error)}") from error
    except ValueError as error:
        raise FastgenError(f"{path} is not valid JSON: {error}") from error


def read_object(path: _PathLike) -> dict[str, Any]:
    """Parse a UTF-8 JSON file that holds an object.

    Raises:
        FastgenError: as `read_json`, or it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise FastgenError(f"{path} is not a JSON object")
    return value


def file_sha256(path: _PathLike) -> str:
    """sha256 of a file's bytes, in hex; the file is read in pieces.

    Raises:
        FastgenError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise FastgenError(f"cannot read {path}: {_reason(error)}") from error
    return digest.hexdigest()


def check_writable(folder: _PathLike) -> Path:
    """Make sure that files can be written into `folder`; it is created, with its parents, when missing.

    Raises:
        FastgenError: it is not a folder, cannot be created or cannot be written to.
    """
    folder = Path(folder)
    probe = folder / f".{secrets.token_hex(6)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Trying is the only reliable test: os.access knows nothing of full, remote or read-only file systems.
        probe.touch(exist_ok=False)
    except FileExistsError as error:
        raise FastgenError(f"output folder {folder}: it is a file, not a folder") from error
    except OSError as error:
        raise FastgenError(f"output folder {folder} is not writable: {_reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return folder


def _resolve_target(path: _PathLike) -> Path:
    """The file to replace. A symbolic link is followed: the link stays and what it points to is replaced."""
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except OSError:
        return target
    if stat.S_ISDIR(mode):
        raise FastgenError(f"cannot write {path}: it is a folder")
    if not stat.S_ISREG(mode):
        # Renaming over /dev/null or a pipe would replace the device by a plain file.
        raise FastgenError(f"cannot write {path}: it is not a regular file")
    return target


def _write_synced(path: Path, data: bytes) -> None:
    # os.open honours the umask, which tempfile's 0600 files do not.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        # Without it a crash after the rename may leave an empty file, and some file systems report a full disk here.
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the renames survive a power cut, where the platform can sync a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
