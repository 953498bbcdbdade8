"""One run at a time in a folder.

A lock is a range of bytes of a hidden file, held by the process through the operating system: it ends with the
process, however that ends, so no stale lock is left after a kill. It also works between machines on network file
systems that support POSIX locks (NFS, Lustre, CephFS); on one that does not, a warning says so and nothing is locked.

    byte 0          the process that uses the whole folder: the first process of a run
    bytes 1 + rank  further processes of the same run
    from _NAMES     single files of the folder, by a hash of their names
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.errors import FastgenError
from fastgen.io import remove_leftovers

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["locked_files", "locked_folder"]

logger = logging.getLogger(__name__)

_FILE = ".fastgen.lock"
_NAMES = 1 << 20
_HELD = (errno.EACCES, errno.EAGAIN)


@dataclass(slots=True)
class _Hold:
    """What this process holds of a folder; `whole` unless only single files or a further process's place."""

    descriptor: int
    whole: bool = False
    users: int = 0


# Closing any descriptor of a file ends all POSIX locks that a process has on it: one descriptor a folder.
_holds: dict[Path, _Hold] = {}


@contextlib.contextmanager
def locked_folder(folder: str | os.PathLike[str], rank: int = 0) -> Iterator[None]:
    """Hold `folder`, which exists, against other runs. A process may hold a folder several times.

    Args:
        rank: of this process among those that share the run; the first takes the lock before the others.

    Raises:
        FastgenError: another run is using the folder, or files in it.
    """
    with _locked(Path(folder), [1 + rank] if rank else None):
        yield


@contextlib.contextmanager
def locked_files(files: Iterable[str | os.PathLike[str]]) -> Iterator[None]:
    """Hold single files, which need not exist, against other runs that write them or use their folder. What killed
    runs left of them is removed.

    Raises:
        FastgenError: another run holds one of them, or its folder.
    """
    folders: dict[Path, set[str]] = {}
    for path in map(Path, files):
        folders.setdefault(path.parent, set()).add(path.name)
    with contextlib.ExitStack() as stack:
        for folder, names in sorted(folders.items()):
            stack.enter_context(_locked(folder, sorted({_place(name) for name in names})))
            remove_leftovers(folder, names)
        yield


def _place(name: str) -> int:
    """The byte that stands for a file."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return _NAMES + int.from_bytes(digest[:5], "big")


@contextlib.contextmanager
def _locked(folder: Path, places: list[int] | None) -> Iterator[None]:
    """Hold bytes of the lock of a folder; None: all, and then leave those of further processes to them."""
    folder = Path(os.path.realpath(folder))
    hold = _acquire(folder, places)
    if hold is None:
        yield
        return
    _holds[folder] = hold
    hold.users += 1
    try:
        yield
    finally:
        hold.users -= 1
        if not hold.users:
            _release(folder, _holds.pop(folder).descriptor)


def _acquire(folder: Path, places: list[int] | None) -> _Hold | None:
    path = folder / _FILE
    if fcntl is None:
        logger.warning("this system has no file locks; make sure that no other run writes to %s", folder)
        return None
    if (hold := _holds.get(folder)) is not None:
        return hold if _lock(folder, hold, places) else None
    while True:
        try:
            hold = _Hold(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
        except OSError as error:
            raise FastgenError(f"cannot write {path}: {error.strerror or error}") from error
        try:
            locked = _lock(folder, hold, places)
        except BaseException:
            os.close(hold.descriptor)
            raise
        # Whoever held it before may have removed the file between our opening and locking it.
        if locked and _same_file(hold.descriptor, path):
            return hold
        os.close(hold.descriptor)
        if not locked:
            return None


def _lock(folder: Path, hold: _Hold, places: list[int] | None) -> bool:
    """Take a part of the lock of an open file; False where the file system has none."""
    try:
        for place in places or ():
            fcntl.lockf(hold.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        if places is None and not hold.whole:
            fcntl.lockf(hold.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.lockf(hold.descriptor, fcntl.LOCK_UN, _NAMES - 1, 1)
            hold.whole = True
            os.truncate(hold.descriptor, 0)
            os.pwrite(hold.descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except OSError as error:
        if error.errno in _HELD:
            raise FastgenError(
                f"{folder} is in use by another run{_holder(hold.descriptor)}; wait for its end, or choose another "
                "folder or name"
            ) from error
        logger.warning("%s cannot be locked (%s); make sure that no other run writes there", folder, error)
        return False
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    with contextlib.suppress(OSError):
        text = os.pread(descriptor, 200, 0).decode("utf-8", "replace")
        return f" ({text})" if text.isprintable() and text else ""
    return ""


def _release(folder: Path, descriptor: int) -> None:
    """Give the lock back, and remove its file when no other process holds a part of it."""
    with contextlib.suppress(OSError):
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / _FILE).unlink(missing_ok=True)
    os.close(descriptor)
