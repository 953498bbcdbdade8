"""The npz files of the ADM evaluator: images read one at a time out of the zip, and reference statistics.

arr_0               uint8 [N, H, W, 3], samples or 10,000 images of a reference
mu, sigma           mean and covariance of pool_3 over the whole reference set
mu_s, sigma_s       the same of the spatial features
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from fastgen.checks import check_integer
from fastgen.errors import FastgenError
from fastgen.evaluation.fid.readers import ImageSource
from fastgen.evaluation.fid.statistics import Gaussian
from fastgen.evaluation.images import MAX_PIXELS
from fastgen.io import atomic_write_bytes, parse_json

__all__ = ["NpzSource", "StatisticsFile", "read_statistics", "statistics_bytes", "write_statistics"]

_IMAGES = ("arr_0", "images", "samples")
_TAPS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_RECORD = "fastgen"  # of our own files: JSON with protocol, extractor, resize mode, dtype and count
_SKIP = 1 << 20
_MAX_RECORD_BYTES = 1 << 20
_MAX_DIMS = 4096  # of features: a covariance of 128 MiB


class NpzSource(ImageSource):
    """The images of an npz file, one in memory at a time, stored or compressed.

    Raises:
        FastgenError: it is not an npz file, or has no uint8 array [N, H, W, 3]; the message lists its arrays.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        try:
            self._archive = zipfile.ZipFile(path)
            names = [name.removesuffix(".npy") for name in self._archive.namelist()]
            self.key = next((key for key in _IMAGES if key in names), names[0] if len(names) == 1 else "")
            if not self.key:
                raise FastgenError(
                    f"{path}: contains {', '.join(names) or 'nothing'}; needs images as {' or '.join(_IMAGES)}"
                )
            with self._archive.open(f"{self.key}.npy") as file:
                shape, fortran, dtype = _header(file)
                self._start = file.tell()
            declared = self._archive.getinfo(f"{self.key}.npy").file_size
        except FastgenError:
            raise
        except Exception as error:  # zipfile, its decompressors and NumPy each raise their own types
            raise FastgenError(f"{path}: not a readable npz file: {error}") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or fortran:
            order = " in Fortran order" if fortran else ""
            raise FastgenError(
                f"{path}: {self.key} is {dtype} {list(shape)}{order}; needs uint8 [N, H, W, 3] with N, H, W >= 1"
            )
        if shape[1] * shape[2] > MAX_PIXELS:
            raise FastgenError(
                f"{path}: {self.key} has images of {shape[2]} x {shape[1]} pixels, at most {MAX_PIXELS} are allowed"
            )
        self.shape = shape
        self._bytes = shape[1] * shape[2] * shape[3]
        if self._start + shape[0] * self._bytes > declared:
            raise FastgenError(f"{path}: {self.key} declares {list(shape)} bytes and has {declared}: it is cut off")
        self._file: IO[bytes] | None = None
        self._raw = _stored(self._archive, f"{self.key}.npy", self.name)

    def __len__(self) -> int:
        return int(self.shape[0])

    def label(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def fetch(self, index: int) -> np.ndarray:
        where = self._start + index * self._bytes
        try:
            if self._raw is not None:
                file, first = self._raw
                file.seek(first + where)
                data = file.read(self._bytes)
            else:
                data = self._inflate(where)
            if len(data) != self._bytes:
                raise EOFError("the file is cut off")
        except Exception as error:  # as above
            raise FastgenError(f"{self.label(index)}: cannot be read: {error}") from error
        return np.frombuffer(data, np.uint8).reshape(self.shape[1:])

    def _inflate(self, where: int) -> bytes:
        """Bytes from a compressed member; going back starts it over."""
        if self._file is None or self._file.tell() > where:
            self._file = self._archive.open(f"{self.key}.npy")
        while (left := where - self._file.tell()) > 0:
            if not self._file.read(min(left, _SKIP)):
                raise EOFError("the file is cut off")
        return self._file.read(self._bytes)

    def decode(self, index: int, data: Any) -> np.ndarray:
        return np.asarray(data)


def _stored(archive: zipfile.ZipFile, member: str, path: str) -> tuple[IO[bytes], int] | None:
    """The file and the offset of a member that is not compressed, so that an image is one seek away."""
    info = archive.getinfo(member)
    if info.compress_type != zipfile.ZIP_STORED:
        return None
    file = open(path, "rb")  # noqa: SIM115 - kept open as long as the source
    file.seek(info.header_offset)
    header = file.read(30)
    # Name and extra field of the local header; those of the directory may differ in length.
    return file, info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(
        header[28:30], "little"
    )


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype


@dataclass(frozen=True, slots=True)
class StatisticsFile:
    """Reference statistics from a file.

    Attributes:
        path: of the file.
        taps: tap of the network ("pool", "spatial", ...) -> statistics.
        record: the description in a file that fastgen wrote (protocol, extractor, resize, dtype); empty for others.
        has_images: the file also contains images.
    """

    path: Path
    taps: Mapping[str, Gaussian]
    record: Mapping[str, Any] = field(default_factory=dict)
    has_images: bool = False

    @property
    def protocol(self) -> str | None:
        """The protocol that made it: recorded, or "adm" for a file with spatial statistics; else it is not known."""
        if "protocol" in self.record:
            return str(self.record["protocol"])
        return "adm" if "spatial" in self.taps else None


def holds_statistics(path: str | Path) -> bool:
    """Whether a file is an npz with statistics."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except Exception:  # a damaged directory fails in a dozen ways; the caller reports it
        return False
    return f"{_RECORD}.npy" in names or {"mu.npy", "sigma.npy"} <= names


def read_statistics(path: str | Path) -> StatisticsFile:
    """Statistics of an npz file of the ADM evaluator, of pytorch-fid, or of our own.

    Raises:
        FastgenError: it is damaged, has no statistics, or they are of wrong type or shape; the message names it.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            record = _read_record(archive) if _RECORD in names else {}
            pairs = {tap: pair for tap, pair in _TAPS.items() if names.issuperset(pair)}
            pairs |= {tap: (f"mu:{tap}", f"sigma:{tap}") for tap in record.get("taps", ())}
            taps = {tap: _read_gaussian(archive, *pair, record.get("count")) for tap, pair in pairs.items()}
    except FastgenError as error:
        raise FastgenError(f"{path}: {error}") from error
    except Exception as error:  # zipfile, its decompressors and NumPy each raise their own types
        raise FastgenError(f"{path}: not a readable npz file of statistics: {error}") from error
    if not taps:
        raise FastgenError(f"{path}: has no statistics (mu and sigma)")
    return StatisticsFile(path, taps, record, any(key in names for key in _IMAGES))


def _read_record(archive: zipfile.ZipFile) -> dict[str, Any]:
    """The description in a file that fastgen wrote."""
    size = archive.getinfo(f"{_RECORD}.npy").file_size
    if size > _MAX_RECORD_BYTES:
        raise FastgenError(f"{_RECORD} declares {size} bytes, at most {_MAX_RECORD_BYTES} are allowed")
    with archive.open(f"{_RECORD}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    record = parse_json(str(array), _RECORD)
    if not isinstance(record, dict) or not all(isinstance(tap, str) for tap in record.get("taps") or ()):
        raise FastgenError(f"{_RECORD} is no record of statistics")
    if record.get("count") is not None:
        check_integer("count", record["count"], 1)
    return record


def _read_gaussian(archive: zipfile.ZipFile, mean: str, covariance: str, count: int | None) -> Gaussian:
    """Two arrays that belong together; shapes are looked at before anything is read.

    Raises:
        FastgenError: they do not, or one is not what its header declares; the message names both.
    """
    shapes, sizes = {}, {}
    for name in (mean, covariance):
        with archive.open(f"{name}.npy") as file:
            shapes[name], _, dtype = _header(file)
            if not np.issubdtype(dtype, np.floating):
                raise FastgenError(f"{name} is {dtype} {list(shapes[name])}; needs floating numbers")
            length = archive.getinfo(f"{name}.npy").file_size - file.tell()
            sizes[name] = (math.prod(shapes[name]) * dtype.itemsize, length)
    dims = shapes[mean][0] if len(shapes[mean]) == 1 else 0
    if not 1 <= dims <= _MAX_DIMS or shapes[covariance] != (dims, dims):
        raise FastgenError(
            f"{mean}, {covariance}: have shapes {list(shapes[mean])} and {list(shapes[covariance])}; need [d] and "
            f"[d, d] with d from 1 to {_MAX_DIMS}"
        )
    arrays = []
    for name, (declared, length) in sizes.items():
        if declared != length:
            raise FastgenError(f"{name}: declares {declared} bytes and has {length}")
        with archive.open(f"{name}.npy") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        arrays.append(torch.from_numpy(array.astype(np.float64, copy=False)))
    try:
        return Gaussian(arrays[0], arrays[1], count)
    except ValueError as error:
        raise FastgenError(f"{mean}, {covariance}: {error}") from error


def statistics_bytes(taps: Mapping[str, Gaussian], record: Mapping[str, Any]) -> bytes:
    """The bytes of a statistics file; `record` says what made them, see `StatisticsFile`."""
    arrays: dict[str, np.ndarray] = {}
    for tap, gaussian in taps.items():
        arrays[f"mu:{tap}"] = gaussian.mean.cpu().numpy()
        arrays[f"sigma:{tap}"] = gaussian.covariance.cpu().numpy()
    count = next((gaussian.count for gaussian in taps.values()), None)
    arrays[_RECORD] = np.array(json.dumps({**record, "taps": list(taps), "count": count}))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def write_statistics(path: str | os.PathLike[str], taps: Mapping[str, Gaussian], record: Mapping[str, Any]) -> None:
    """Write a statistics file, atomically."""
    atomic_write_bytes(path, statistics_bytes(taps, record))
