"""References to compare images with: other images, or statistics in a file; those of images are cached."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgen.errors import FastgenError
from fastgen.evaluation.chunks import ChunkStore
from fastgen.evaluation.distributed import Group
from fastgen.evaluation.fid.extractors import Extractor
from fastgen.evaluation.fid.features import check_count, extract
from fastgen.evaluation.fid.npz import NpzSource, StatisticsFile, holds_statistics, read_statistics
from fastgen.evaluation.fid.readers import ImageSource, open_images
from fastgen.evaluation.fid.statistics import Gaussian, Moments
from fastgen.io import user_cache_dir

__all__ = ["Reference", "ReferenceStatistics", "load_reference", "open_reference"]

_FORMAT = 1  # of the kept statistics


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference before anything is computed.

    Attributes:
        name: what the user gave.
        images: its images, if it has any.
        statistics: its statistics, if it is a file of them.
        protocol: that the user says a file without a record was made by.
    """

    name: str
    images: ImageSource | None = None
    statistics: StatisticsFile | None = None
    protocol: str | None = None

    def check(self, extractor: Extractor, taps: Sequence[str], protocol: str) -> None:
        """Refuse statistics of another network or another protocol.

        Args:
            taps: that are needed of the statistics.
            protocol: name of the requested protocol.

        Raises:
            FastgenError: names the file, its content and what is needed.
        """
        file = self.statistics
        if file is None:
            return
        if extractor.name != "inception-tf" and not file.record:
            raise FastgenError(f"{file.path}: has statistics of Inception, {extractor.name} needs its own")
        made_by = file.protocol or self.protocol
        if made_by is None:
            raise FastgenError(
                f"{file.path}: does not say which protocol made it; name it with --reference-protocol (a file of "
                "pytorch-fid is legacy-pytorch)"
            )
        if self.protocol is not None and self.protocol != made_by:
            raise FastgenError(f"{file.path}: has statistics of protocol {made_by}, not {self.protocol}")
        if file.record:
            kept = {key: file.record.get(key) for key in ("name", "fingerprint", "resize", "dtype", "protocol")}
            wanted = {**extractor.describe(), "protocol": protocol}
            different = [f"{key} {kept[key]} there and {wanted[key]} now" for key in kept if kept[key] != wanted[key]]
            if different:
                raise FastgenError(f"{file.path}: has statistics of another protocol: {'; '.join(different)}")
        elif made_by != protocol:
            raise FastgenError(
                f"{file.path}: has statistics of protocol {made_by}, and {protocol} was asked for; use --protocol "
                f"{made_by}, or give the images themselves"
            )
        for tap in taps:
            held = file.taps[tap].dims if tap in file.taps else "no"
            if held != extractor.taps[tap]:
                raise FastgenError(
                    f"{file.path}: has statistics of {held} {tap} features, {extractor.name} has {extractor.taps[tap]}"
                )


def open_reference(path: str | Path, protocol: str | None = None) -> Reference:
    """The reference at `path`: images (folder, zip, tar, npz), or an npz of statistics, with images or without.

    Args:
        protocol: that a file of statistics was made by, where the file does not say.

    Raises:
        FastgenError: there is nothing of the kind, or it is damaged; the message names it.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".npz" and holds_statistics(path):
        file = read_statistics(path)
        return Reference(str(path), NpzSource(path) if file.has_images else None, file, protocol)
    return Reference(str(path), open_images(path))


@dataclass(slots=True)
class ReferenceStatistics:
    """A reference in the features of one network.

    Attributes:
        gaussians: tap -> statistics.
        features: tap -> features, on the main process.
        count: images behind `gaussians`; None where a file does not say.
        sha256: of its images; None for statistics.
        cached: nothing was computed.
    """

    gaussians: dict[str, Gaussian] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    count: int | None = None
    sha256: str | None = None
    cached: bool = False

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"n": self.count, "sha256": self.sha256}


def load_reference(
    reference: Reference,
    extractor: Extractor,
    *,
    taps: Sequence[str],
    keep: Sequence[str] = (),
    count: int | None = None,
    group: Group | None = None,
    cache: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    mixed_sizes: bool = False,
    on_done: Callable[[int], None] | None = None,
) -> ReferenceStatistics:
    """Statistics (`taps`) and features (`keep`) of a reference, from the cache if they were made before.

    The cache is keyed by the sha256 of the images with their names, the hash of the network, the resize mode, the
    dtype, the protocol and the number of images.

    Args:
        count: how many images are taken, from the first; all when None. A file of statistics is used as it is.
        cache: folder; `user_cache_dir()` when None.

    Raises:
        FastgenError: features are needed and the reference has no images, or what `extract` raises.
    """
    group = group or Group()
    found = ReferenceStatistics()
    if reference.statistics is not None:
        found.gaussians = {tap: reference.statistics.taps[tap] for tap in taps}
        found.count = next((g.count for g in found.gaussians.values()), None)
        taps = ()
    if not taps and not keep:
        return found
    if reference.images is None:
        raise FastgenError(f"{reference.name}: has statistics only; kernel distances and precision need its images")
    n = check_count(reference.images, count)
    root = user_cache_dir() if cache is None else Path(cache)
    found.sha256 = group.share(reference.images.digest(n) if group.is_main else None)
    key = [_FORMAT, found.sha256, extractor.describe(), n]
    kept = {tap: ChunkStore(root, f"statistics-{tap}", [*key, tap]) for tap in taps}
    known = group.share({tap: _kept(kept[tap], extractor.taps[tap], n) for tap in taps} if group.is_main else None)
    found.gaussians |= {
        tap: Moments.from_bytes(moments, extractor.taps[tap], extractor.device).gaussian()
        for tap, moments in known.items()
        if moments is not None
    }
    missing = [tap for tap in taps if tap not in found.gaussians]
    found.cached = not missing and not keep
    if not found.cached:
        needed = [tap for tap in extractor.taps if tap in missing or tap in keep]
        features, store = extract(
            reference.images,
            extractor,
            count=n,
            taps=needed,
            sums=missing,
            keep=keep,
            group=group,
            store_root=root,
            batch_size=batch_size,
            workers=workers,
            mixed_sizes=mixed_sizes,
            on_done=on_done,
        )
        found.features = features.arrays
        for tap in missing:
            found.gaussians[tap] = features.moments[tap].gaussian()
            if group.is_main:
                kept[tap].save(0, features.moments[tap].to_bytes())
        group.meet()
        if group.is_main and not keep:
            store.discard()  # the sums are all that will be needed; kept features are read again
    if found.gaussians and reference.statistics is None:
        found.count = n
    return found


def _kept(store: ChunkStore, dims: int, count: int) -> bytes | None:
    data = store.load(0)
    if data is not None:
        try:
            if Moments.from_bytes(data, dims).count == count:
                return data
        except ValueError:
            pass
    return None
