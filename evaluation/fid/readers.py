"""Where images come from: a folder, a zip, webdataset tars, an npz of the ADM evaluator, or a function.

A source knows how many images it has and gives each one by its number, in an order that is the same everywhere, so
that processes can share the work without talking. Reading (`fetch`, in order, one thread) and decoding (`decode`, any
thread) are two steps. Nothing is ever loaded whole.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.detections import check_image
from fastgen.evaluation.images import IMAGE_SUFFIXES, MAX_FILE_BYTES, decode_image, name_skipped
from fastgen.evaluation.samples import prompt_folders, sample_files
from fastgen.io import parse_json, read_limited

__all__ = [
    "IMAGE_SUFFIXES",
    "CallbackSource",
    "FolderSource",
    "ImageSource",
    "TarSource",
    "ZipSource",
    "open_images",
]

_MAX_TEXT_BYTES = 1 << 20  # of a caption
_CAPTION_KEYS = ("caption", "prompt", "text")


class ImageSource(ABC):
    """Images by number, 0 .. len - 1.

    Attributes:
        name: the path that the user gave, for messages and results.
        prompts: one a picture, where the source has them.
    """

    name: str
    prompts: Sequence[str] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def label(self, index: int) -> str:
        """What to call an image in a message: its file."""

    @abstractmethod
    def fetch(self, index: int) -> Any:
        """An image as it is stored. One thread at a time, best in rising order.

        Raises:
            FastgenError: it cannot be read; the message names it.
        """

    def decode(self, index: int, data: Any) -> np.ndarray:
        """What `fetch` gave as uint8 [H, W, 3]; any thread.

        Raises:
            FastgenError: it is no image; the message names it.
        """
        return decode_image(data, self.label(index))

    def digest(self, count: int | None = None) -> str:
        """sha256 over the stored bytes of the first `count` images (all when None), in order, with their names."""
        digest = hashlib.sha256()
        for index in range(len(self) if count is None else count):
            data = self.fetch(index)
            raw = data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
            digest.update(f"{self._digest_name(index)} {len(raw)}\n".encode())
            digest.update(raw)
        return digest.hexdigest()

    def _digest_name(self, index: int) -> str:
        return str(index)

    def names_digest(self) -> str:
        """sha256 over the names of all images, in order, and their prompts; reads none of them."""
        names = [self._digest_name(index) for index in range(len(self))]
        return hashlib.sha256(json.dumps([names, list(self.prompts or ())]).encode()).hexdigest()

    def read(self, index: int) -> np.ndarray:
        """One image, uint8 [H, W, 3]."""
        return self.decode(index, self.fetch(index))


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in Path(name).parts)


def _images(place: object, names: Iterable[str]) -> list[str]:
    """The images among the files of a place, in their order; images of other formats are named in the log."""
    shown = [name for name in names if not _is_hidden(name)]
    name_skipped(place, shown)
    found = [name for name in shown if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise FastgenError(f"{place}: has no image ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _captions(names: Sequence[str], read: Callable[[str], bytes | None]) -> list[str] | None:
    """The text next to each image (.txt, or a caption in .json), or None when any image has none."""
    found: list[str] = []
    for name in names:
        stem = name[: len(name) - len(Path(name).suffix)]
        if (text := read(f"{stem}.txt")) is not None:
            found.append(text.decode("utf-8", "replace").strip())
        elif (data := read(f"{stem}.json")) is not None:
            try:
                record = parse_json(data, name)
                found.append(str(next(record[key] for key in _CAPTION_KEYS if key in record)))
            except (ValueError, TypeError, StopIteration):  # FastgenError is a ValueError
                return None
        else:
            return None
    return found


def _listed_captions(folder: Path, names: Sequence[str]) -> list[str] | None:
    """Captions in the metadata.jsonl of an image folder of Hugging Face `datasets`, or None when one has none."""
    path = folder / "metadata.jsonl"
    if not path.is_file():
        return None
    found: dict[str, str] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                record = parse_json(line, f"{path}, line {number}")
                try:
                    found[record["file_name"]] = str(next(record[key] for key in _CAPTION_KEYS if key in record))
                except (KeyError, TypeError, StopIteration):
                    return None
    return [found[name] for name in names] if found.keys() >= set(names) else None


def _metadata_prompt(path: Path) -> str | None:
    try:
        return str(parse_json(read_limited(path, _MAX_TEXT_BYTES).splitlines()[0], path)["prompt"])
    except (ValueError, KeyError, IndexError, TypeError):  # FastgenError is a ValueError
        return None  # code that needs prompts reports their absence


class FolderSource(ImageSource):
    """All images below a folder, by the alphabet of their paths; hidden files are passed over.

    A folder in GenEval's layout (NNNNN/metadata.jsonl, NNNNN/samples/*.png) gives its samples with their prompts and
    not its grids.

    Raises:
        FastgenError: there is no such folder, or no image in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = str(folder)
        if not self.folder.is_dir():
            raise FastgenError(f"{folder}: no such folder of images")
        if any(self.folder.glob("[0-9]*/metadata.jsonl")):
            homes = prompt_folders(self.folder)
            found = {home: [path.relative_to(self.folder).as_posix() for path in sample_files(home)] for home in homes}
            self.files = [name for names in found.values() for name in names]
            if not self.files:
                raise FastgenError(f"{folder}: its prompt folders have no image")
            texts = {home: _metadata_prompt(home / "metadata.jsonl") for home in homes}
            if all(text is not None for text in texts.values()):
                self.prompts = [str(texts[home]) for home, names in found.items() for _ in names]
            return
        inside = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*"))
        self.files = sorted(_images(folder, (name for name in inside if (self.folder / name).is_file())))
        self.prompts = _captions(self.files, self._read_beside) or _listed_captions(self.folder, self.files)

    def _read_beside(self, name: str) -> bytes | None:
        path = self.folder / name
        return read_limited(path, _MAX_TEXT_BYTES) if path.is_file() else None

    def __len__(self) -> int:
        return len(self.files)

    def label(self, index: int) -> str:
        return str(self.folder / self.files[index])

    def fetch(self, index: int) -> bytes:
        return read_limited(self.folder / self.files[index], MAX_FILE_BYTES)

    def _digest_name(self, index: int) -> str:
        return self.files[index]


class ZipSource(ImageSource):
    """All images in a zip file, by the alphabet of their names.

    Raises:
        FastgenError: it is no zip file, or there is no image in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        try:
            self._archive = zipfile.ZipFile(path)
        except Exception as error:  # a damaged directory fails in a dozen ways
            raise FastgenError(f"{path}: not a readable zip file: {error}") from error
        names = self._archive.namelist()
        self.files = sorted(_images(path, names))
        known = set(names)
        self.prompts = _captions(self.files, lambda name: self._read(name, _MAX_TEXT_BYTES) if name in known else None)

    def _read(self, name: str, limit: int) -> bytes:
        """A member; at most its declared size is read.

        Raises:
            FastgenError: it is larger than `limit`, or cannot be read.
        """
        try:
            size = self._archive.getinfo(name).file_size
            if size > limit:
                raise FastgenError(f"{self.name}/{name}: declares {size} bytes, at most {limit} are allowed")
            return self._archive.read(name)
        except FastgenError:
            raise
        except Exception as error:  # zipfile and its decompressors each raise their own types
            raise FastgenError(f"{self.name}/{name}: cannot be read: {error}") from error

    def __len__(self) -> int:
        return len(self.files)

    def label(self, index: int) -> str:
        return f"{self.name}/{self.files[index]}"

    def fetch(self, index: int) -> bytes:
        return self._read(self.files[index], MAX_FILE_BYTES)

    def _digest_name(self, index: int) -> str:
        return self.files[index]


class TarSource(ImageSource):
    """All images in the shards of a webdataset (tar files), in the order of the shards and of their members.

    A caption is the member of the same name with the ending .txt, or "caption" in that of .json.

    Raises:
        FastgenError: a shard is no tar file, or there is no image in any.
    """

    def __init__(self, shards: Sequence[str | Path], name: str | None = None) -> None:
        self.name = name or str(shards[0])
        self._paths = list(shards)
        self._shards: list[tarfile.TarFile] = []
        self._members: list[tuple[int, tarfile.TarInfo]] = []
        captions: list[str] | None = []
        for number, shard in enumerate(shards):
            try:
                archive = tarfile.open(shard)  # noqa: SIM115 - kept open: members are read from it later
                members = dict(_members(archive, shard))
            except FastgenError:
                raise
            except Exception as error:  # tarfile and its decompressors each raise their own types
                raise FastgenError(f"{shard}: not a readable tar file: {error}") from error
            self._shards.append(archive)
            name_skipped(shard, (name for name in members if not _is_hidden(name)))
            images = [name for name in members if _is_image(name)]
            self._members += [(number, members[name]) for name in images]
            own = _captions(images, lambda name, a=archive, m=members: _member(a, m.get(name)))  # type: ignore[misc]
            captions = None if captions is None or own is None else captions + own
        if not self._members:
            raise FastgenError(f"{self.name}: has no image ({', '.join(IMAGE_SUFFIXES)})")
        self.prompts = captions

    def __len__(self) -> int:
        return len(self._members)

    def label(self, index: int) -> str:
        number, member = self._members[index]
        return f"{self._paths[number]}/{member.name}"

    def fetch(self, index: int) -> bytes:
        number, member = self._members[index]
        try:
            data = _member(self._shards[number], member)
        except Exception as error:  # tarfile and its decompressors each raise their own types
            raise FastgenError(f"{self.label(index)}: cannot be read: {error}") from error
        if data is None or len(data) != member.size:
            raise FastgenError(f"{self.label(index)}: is cut off")
        return data

    def _digest_name(self, index: int) -> str:
        return self._members[index][1].name


def _members(archive: tarfile.TarFile, shard: str | Path) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The files of a tar; sizes are looked at before anything is read or skipped."""
    for member in archive:
        if member.size > MAX_FILE_BYTES:
            raise FastgenError(
                f"{shard}/{member.name}: declares {member.size} bytes, at most {MAX_FILE_BYTES} are allowed"
            )
        if member.isfile():
            yield member.name, member


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo | None) -> bytes | None:
    if member is None:
        return None
    file = archive.extractfile(member)
    return None if file is None else file.read()


class CallbackSource(ImageSource):
    """Images that a function makes.

    Args:
        count: how many.
        make: number -> uint8 [H, W, 3]; equal numbers give equal images.
        identity: identifies these images without hashing all of them.
        name: for messages and results.
        prompts: one an image, if there are any.
    """

    def __init__(
        self,
        count: int,
        make: Callable[[int], np.ndarray],
        *,
        identity: str,
        name: str = "generated",
        prompts: Sequence[str] | None = None,
    ) -> None:
        if count < 1:
            raise ValueError(f"count: needs an integer >= 1, got {count}")
        if prompts is not None and len(prompts) != count:
            raise ValueError(f"prompts: needs {count}, one for each image, got {len(prompts)}")
        self.name, self.prompts = name, prompts
        self._count, self._make, self._identity = count, make, identity

    def __len__(self) -> int:
        return self._count

    def label(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def fetch(self, index: int) -> np.ndarray:
        return check_image(self._make(index), self.label(index))

    def decode(self, index: int, data: Any) -> np.ndarray:
        return np.asarray(data)

    def digest(self, count: int | None = None) -> str:
        key = f"{self._identity} {self._count if count is None else count}"
        return hashlib.sha256(key.encode()).hexdigest()


def open_images(path: str | Path) -> ImageSource:
    """The images at `path`: a folder of images or of tar shards, a .zip, .tar or .npz file.

    Raises:
        FastgenError: it does not exist; the message names the path and what it should be.
    """
    path = Path(path)
    if path.is_dir():
        shards = sorted(item for item in path.iterdir() if item.suffix == ".tar" and not item.name.startswith("."))
        return TarSource(shards, str(path)) if shards else FolderSource(path)
    if not path.exists():
        raise FastgenError(f"{path}: no such file or folder of images")
    if path.suffix == ".npz":
        from fastgen.evaluation.fid.npz import NpzSource

        return NpzSource(path)
    if path.suffix == ".zip":
        return ZipSource(path)
    if path.suffix == ".tar" or path.name.endswith((".tar.gz", ".tgz")):
        return TarSource([path])
    raise FastgenError(f"{path}: needs a folder of images, or a .zip, .tar or .npz file")
