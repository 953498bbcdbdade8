"""Work in numbered chunks. Results are kept on the disk until all are there, so that a killed run resumes.

A chunk is written completely or not at all, and its result depends only on its number and its store's key. So the
results do not depend on interruptions, nor on which process, of how many, computes a chunk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fastgen.errors import FastgenError
from fastgen.evaluation.distributed import Group
from fastgen.io import atomic_write_bytes, check_writable

__all__ = ["ChunkStore", "ranges", "run_chunks"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ChunkStore:
    """A folder of finished chunks.

    Args:
        root: folder that contains stores; None keeps nothing.
        kind: of the results, part of the store's name.
        key: everything the chunks depend on, JSON-ready.
    """

    def __init__(self, root: str | os.PathLike[str] | None, kind: str, key: Any) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.folder = None if root is None else Path(root) / f"{kind}-{digest[:24]}"

    def load(self, index: int) -> bytes | None:
        """The bytes of a chunk with their checksum verified, or None."""
        if self.folder is None:
            return None
        try:
            raw = self._path(index).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(raw[32:]).digest() != raw[:32]:
            logger.warning("%s is damaged and is computed again", self._path(index))
            return None
        return raw[32:]

    def save(self, index: int, data: bytes) -> None:
        """Keep a chunk. A full or read-only disk costs resuming, not the result."""
        if self.folder is None:
            return
        try:
            check_writable(self.folder)
            atomic_write_bytes(self._path(index), hashlib.sha256(data).digest() + data)
        except FastgenError as error:
            logger.warning("an interruption would cost all work so far: %s", error)
            self.folder = None

    def discard(self) -> None:
        """Remove the folder: the result is written."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                shutil.rmtree(self.folder)
                self.folder.parent.rmdir()  # if it was the last

    def _path(self, index: int) -> Path:
        if self.folder is None:
            raise ValueError("this store keeps nothing")
        return self.folder / f"{index:06d}.chunk"


def ranges(total: int, size: int) -> list[range]:
    """0 .. total - 1 in consecutive ranges of `size`."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def run_chunks(
    total: int,
    size: int,
    *,
    group: Group,
    store: ChunkStore,
    compute: Callable[[range], T],
    encode: Callable[[T], bytes],
    decode: Callable[[bytes, range], T],
    on_done: Callable[[range], None] | None = None,
) -> Iterator[tuple[int, T]]:
    """This process's chunks in order, each loaded or computed: (number, result).

    Args:
        total, size: items, and how many are a chunk.
        compute: items -> result.
        encode, decode: result to bytes and back; `decode` raises ValueError for what does not fit.
        on_done: called with the items of each finished chunk.

    Raises:
        PeerFailed: another process failed.
    """
    for number, items in enumerate(ranges(total, size)):
        if not group.owns(number):
            continue
        group.check()
        result: T | None = None
        if (data := store.load(number)) is not None:
            try:
                result = decode(data, items)
            except ValueError as error:
                logger.warning("chunk %d is not usable and is computed again: %s", number, error)
        if result is None:
            result = compute(items)
            store.save(number, encode(result))
        if on_done is not None:
            on_done(items)
        yield number, result
