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
import signal
import stat
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.errors import FastgenError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "atomic_write_bytes",
    "atomic_write_json",
    "atomic_write_many",
    "check_format",
    "check_writable",
    "encode_json",
    "encode_png",
    "file_sha256",
    "parse_json",
    "read_json",
    "read_object",
    "read_limited",
    "remove_leftovers",
    "save_png",
    "user_cache_dir",
]

_PathLike = str | os.PathLike[str]

# Far above any file of fastgen or of the Hub; larger ones are refused before they take the memory.
_MAX_JSON_BYTES = 256 << 20
_MAX_JSON_DEPTH = 64
_STAGED_NAME = 100  # characters of a file's name in that of its temporary file
_PROBE = "fastgen-probe"  # used when there is no file yet, only a check whether one can be written
_MAX_DIGITS = 100  # of an integer; transformers writes 1e30 as one

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

    All of them are on the disk under temporary names before the first one is renamed, so a full disk changes no
    target. The renames follow in the given order: put the file whose presence means "finished" last. Ctrl-C comes
    before all of them or after; only a process that is killed can end between two.

    Raises:
        FastgenError: as `atomic_write_bytes`.
    """
    staged: list[tuple[Path, Path]] = []
    target = Path()
    try:
        for path, data in files:
            target = _resolve_target(path)
            temporary = target.with_name(_temporary_name(target.name))
            # Listed before it exists, so that an interrupt at any point finds it and removes it.
            staged.append((temporary, target))
            _write_synced(temporary, data)
        with _signals_wait():
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


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Ctrl-C, and SIGTERM where Python handles it, are handled at the end of the block."""
    if threading.current_thread() is not threading.main_thread():  # which alone handles signals
        yield
        return
    # A mask of the main thread would not do: another thread, of torch for example, would take the signal.
    came: list[int] = []
    numbers = (int(signal.SIGINT), int(signal.SIGTERM))
    handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _temporary_name(name: str) -> str:
    """By which `remove_leftovers` knows it."""
    return f".{name[:_STAGED_NAME]}.{secrets.token_hex(6)}.tmp"


def remove_leftovers(folder: _PathLike, names: Collection[str] | None = None) -> None:
    """Remove what writes into `folder` left when their process was killed. Nobody else may be writing there.

    Args:
        names: of the files that were written, in `folder` itself; None: any file, in the folders in it too.
    """
    wanted = None if names is None else {name[:_STAGED_NAME] for name in names}
    for path in Path(folder).rglob(".*.tmp") if names is None else Path(folder).glob(".*.tmp"):
        found = re.fullmatch(r"\.(.+)\.[0-9a-f]{12}\.tmp", path.name)
        if found and (wanted is None or found[1] in wanted):
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


def check_format(found: object, label: object, number: int) -> None:
    """Refuse a file in a format that this version of fastgen does not read.

    Args:
        found: what the file has as "format"; None where it has none.
        label: what the message calls the file.
        number: the format that can be read.

    Raises:
        FastgenError: names the format of the file, and what can be read.
    """
    hint = "make it again"
    if found is None:
        has = "has no format number"
    elif not isinstance(found, int) or isinstance(found, bool):
        has = f"has format {str(found)[:40]!r}, which is no number"
    elif found == number:
        return
    else:
        has, hint = f"has format {found}", "update fastgen" if found > number else hint
    raise FastgenError(f"{label}: {has}; this version of fastgen reads {number}; {hint}")


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


def read_limited(path: _PathLike, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        FastgenError: it cannot be read, is no regular file, or is larger.
    """
    try:
        status = os.stat(path)  # before it is opened: opening a pipe would wait for its writer
        if not stat.S_ISREG(status.st_mode):
            raise FastgenError(f"cannot read {path}: it is not a regular file")
        if status.st_size > limit:
            raise FastgenError(f"cannot read {path}: it has {status.st_size} bytes, at most {limit} are allowed")
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise FastgenError(f"cannot read {path}: there is no such file") from error
    except OSError as error:
        raise FastgenError(f"cannot read {path}: {_reason(error)}") from error


def parse_json(text: str | bytes, label: object) -> Any:
    """Parse JSON from outside.

    Args:
        text: bytes are UTF-8.
        label: what to call it in a message: a file, or a file and a line.

    Raises:
        FastgenError: it is not JSON, is nested too deeply, or holds an integer or a text that no file can hold.
    """
    try:
        value = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, parse_int=_short_integer)
        _check_depth(value)
        if ("\\ud" if isinstance(text, str) else b"\\ud") in text.lower():  # type: ignore[operator]
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be written again
    except RecursionError as error:
        raise FastgenError(f"{label} is not valid JSON: it is nested too deeply") from error
    except ValueError as error:
        raise FastgenError(f"{label} is not valid JSON: {error}") from error
    return value


def _short_integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, at most {_MAX_DIGITS} are allowed")
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [item for item in (value,) if isinstance(item, (dict, list))]
    for _ in range(_MAX_JSON_DEPTH):
        inner = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in inner if isinstance(child, (dict, list))]
        if not level:
            return
    raise ValueError(f"it is nested more than {_MAX_JSON_DEPTH} levels deep")


def read_json(path: _PathLike) -> Any:
    """Parse a UTF-8 JSON file; see `parse_json`.

    Raises:
        FastgenError: the file cannot be read or is not JSON; the message names it.
    """
    return parse_json(read_limited(path, _MAX_JSON_BYTES), path)


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


def check_writable(folder: _PathLike, *, create: bool = True) -> Path:
    """Make sure that files can be written into `folder`; it is created, with its parents, when missing.

    Args:
        create: False: a folder that is missing stays so, and the nearest one above it is tried.

    Raises:
        FastgenError: it is not a folder, cannot be created or cannot be written to.
    """
    folder = Path(folder)
    place = folder if create else next(p for p in (folder, *folder.absolute().parents) if p.exists())
    probe = place / _temporary_name(_PROBE)
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        # Trying is the only reliable test: os.access knows nothing of full, remote or read-only file systems.
        probe.touch(exist_ok=False)
    except FileExistsError as error:
        raise FastgenError(f"output folder {folder}: it is a file, not a folder") from error
    except OSError as error:
        raise FastgenError(f"output folder {folder} is not writable: {_reason(error)}") from error
    finally:
        # This one and those of killed processes. Another process does not miss its own.
        for left in (probe, *place.glob(f".{_PROBE}.*.tmp")):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)
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


def user_cache_dir() -> Path:
    """$FASTGEN_CACHE, else $XDG_CACHE_HOME/fastgen, else ~/.cache/fastgen."""
    if os.environ.get("FASTGEN_CACHE"):
        return Path(os.environ["FASTGEN_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastgen"
