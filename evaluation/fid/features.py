"""One pass of a network over images: sums for Fréchet distances, and the features where a metric needs them.

Images are read in order by one thread, decoded and resized by others, and reach the network in batches of a chunk.
Chunks are the unit of sharing between processes and of resuming, see `fastgen.evaluation.chunks`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastgen.errors import FastgenError
from fastgen.evaluation.chunks import ChunkStore, ranges, run_chunks
from fastgen.evaluation.distributed import Group
from fastgen.evaluation.fid.extractors import Extractor
from fastgen.evaluation.fid.readers import ImageSource
from fastgen.evaluation.fid.statistics import Moments

__all__ = ["CHUNK", "Features", "extract"]

CHUNK = 256  # images; 4 MB of features of Inception
_FORMAT = 1
T = TypeVar("T")


@dataclass(slots=True)
class Features:
    """Results of a pass over the images.

    Attributes:
        count: images.
        moments: tap -> sums over all images, equal on all processes.
        arrays: tap -> float32 [count, width] in the order of the images, on the main process, of the taps kept.
        resolution: (height, width) of the images; None when they differ.
    """

    count: int
    moments: dict[str, Moments] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)
    resolution: tuple[int, int] | None = None


def extract(
    source: ImageSource,
    extractor: Extractor,
    *,
    count: int | None = None,
    taps: Sequence[str] | None = None,
    sums: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    group: Group | None = None,
    store_root: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    mixed_sizes: bool = False,
    on_done: Callable[[int], None] | None = None,
) -> tuple[Features, ChunkStore]:
    """The features of the first `count` images.

    Args:
        count: how many are taken; all when None.
        taps: which of the extractor's; all when None.
        sums: taps whose sums are made; all of `taps` when None.
        keep: taps whose features are kept.
        group: the processes that share the work.
        store_root: where finished chunks are kept until `ChunkStore.discard`; None keeps none.
        batch_size: images in one pass of the network.
        workers: threads that decode and resize.
        mixed_sizes: allow images of different sizes.
        on_done: called with the number of images that this process has just finished.

    Returns:
        the features, and the store of their chunks.

    Raises:
        FastgenError: fewer images than `count`, an unreadable one, one of another size, a prompt that is missing, or
            a feature that is NaN or infinite; the message names the image.
    """
    group = group or Group()
    n = check_count(source, count)
    if extractor.needs_prompts and source.prompts is None:
        raise FastgenError(f"{source.name}: has no prompts, which {extractor.name} needs")
    taps = list(extractor.taps) if taps is None else list(taps)
    size = None if mixed_sizes else group.share(source.read(0).shape[:2] if group.is_main else None)
    digest = "" if store_root is None else group.share(source.digest(n) if group.is_main else None)
    key = [_FORMAT, digest, extractor.describe(), taps, n, batch_size, CHUNK]
    store = ChunkStore(store_root, "features", key)
    added = taps if sums is None else sums
    found = Features(n, {tap: Moments(extractor.taps[tap], extractor.device) for tap in added}, resolution=size)
    own: dict[str, dict[int, Tensor]] = {tap: {} for tap in keep}
    whole = {tap: torch.empty(n, extractor.taps[tap]) for tap in keep} if group.is_main else {}

    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:

        def compute(items: range) -> dict[str, Tensor]:
            return _chunk(source, extractor, items, taps, size, pool, batch_size, group)

        def decode(data: bytes, items: range) -> dict[str, Tensor]:
            return _decode(data, {tap: (len(items), extractor.taps[tap]) for tap in taps})

        for number, part in run_chunks(
            n,
            CHUNK,
            group=group,
            store=store,
            compute=compute,
            encode=_encode,
            decode=decode,
            on_done=None if on_done is None else lambda items: on_done(len(items)),
        ):
            for tap in found.moments:
                found.moments[tap].update(part[tap].to(found.moments[tap].total.device))
            for tap in keep:
                if group.is_main:
                    whole[tap][number * CHUNK : number * CHUNK + len(part[tap])] = part[tap]
                else:
                    own[tap][number] = part[tap]
    _collect(group, found.moments, own, whole, {tap: extractor.taps[tap] for tap in keep}, n)
    found.arrays = whole
    return found, store


def check_count(source: ImageSource, count: int | None) -> int:
    """How many images are taken.

    Raises:
        FastgenError: the source has fewer than `count`.
    """
    if count is not None and count < 1:
        raise FastgenError(f"n: {count} is not allowed, needs >= 1")
    if count is not None and count > len(source):
        raise FastgenError(f"{source.name}: has {len(source)} images, {count} are needed")
    return len(source) if count is None else count


def _chunk(
    source: ImageSource,
    extractor: Extractor,
    items: range,
    taps: Sequence[str],
    size: tuple[int, int] | None,
    pool: ThreadPoolExecutor,
    batch_size: int,
    group: Group,
) -> dict[str, Tensor]:
    """The features of a chunk, checked, on the CPU."""

    def prepare(index: int, data: object) -> Tensor:
        image = source.decode(index, data)
        if size is not None and image.shape[:2] != size:
            raise FastgenError(
                f"{source.label(index)}: is {image.shape[0]} x {image.shape[1]} pixels, the first image is "
                f"{size[0]} x {size[1]}; --mixed-sizes allows it"
            )
        return extractor.prepare(image)

    def submitted() -> Iterator[Future[Tensor]]:
        for index in items:
            group.check()
            yield pool.submit(prepare, index, source.fetch(index))

    prepared = _ahead(submitted(), 2 * batch_size)
    parts: dict[str, list[Tensor]] = {tap: [] for tap in taps}
    for batch in ranges(len(items), batch_size):
        tensors = [next(prepared).result() for _ in batch]
        indices = [items[position] for position in batch]
        prompts = [source.prompts[index] for index in indices] if source.prompts and extractor.needs_prompts else []
        # One size a batch unless sizes are mixed; networks that do not resize then take images one by one.
        together = len({tensor.shape for tensor in tensors}) == 1
        stacks = [torch.stack(tensors)] if together else [tensor[None] for tensor in tensors]
        texts = [prompts] if together else [[prompt] for prompt in prompts or [""] * len(tensors)]
        for stack, text in zip(stacks, texts, strict=True):
            features = extractor(stack, text)
            for tap in taps:
                parts[tap].append(features[tap].float().cpu())
        for tap in taps:
            _check_finite(source, extractor, indices, torch.cat(parts[tap])[-len(indices) :])
    return {tap: torch.cat(parts[tap]) for tap in taps}


def _check_finite(source: ImageSource, extractor: Extractor, indices: Sequence[int], features: Tensor) -> None:
    finite = torch.isfinite(features).all(1)
    if not finite.all():
        worst = indices[int((~finite).nonzero()[0])]
        raise FastgenError(f"{source.label(worst)}: {extractor.name} gives NaN or infinite features for it")


def _ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """`items`, drawn up to `depth` in advance."""
    waiting: list[T] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.pop(0)
    yield from waiting


def _collect(
    group: Group,
    moments: dict[str, Moments],
    own: dict[str, dict[int, Tensor]],
    whole: dict[str, Tensor],
    widths: dict[str, int],
    n: int,
) -> None:
    """Add the sums of all processes and bring the kept features to the main one."""
    if group.size == 1:
        return
    for part in moments.values():
        count = torch.tensor([part.count], device=part.total.device)
        group.sum_(part.total, part.outer, count)
        part.count = int(count)
    group.meet()
    for tap, width in widths.items():
        for number, items in enumerate(ranges(n, CHUNK)):
            source = number % group.size
            received = group.to_main(own[tap].get(number), source, (len(items), width))
            if group.is_main and source and received is not None:
                whole[tap][items.start : items.stop] = received


def _encode(parts: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{tap: value.numpy() for tap, value in parts.items()})  # type: ignore[arg-type]
    return buffer.getvalue()


def _decode(data: bytes, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            parts = {tap: torch.from_numpy(file[tap]) for tap in shapes}
    except Exception as error:  # zipfile, zlib, numpy and struct each raise their own type
        raise ValueError(str(error)) from error
    for tap, shape in shapes.items():
        if tuple(parts[tap].shape) != shape or parts[tap].dtype != torch.float32:
            raise ValueError(f"{tap} is {parts[tap].dtype} {tuple(parts[tap].shape)}, needs float32 {shape}")
    return parts
