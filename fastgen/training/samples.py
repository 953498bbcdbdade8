"""A trained pipeline's own samples as training data, with their prompts or classes, in a folder of shards.

    <folder>/samples.json             settings; other settings need another folder
    <folder>/00000.safetensors        up to 64 samples: latents as the transformer reads them (float16), or tokens

Shards are written atomically and every sample has its own seed, so an interrupted run resumes and writes the same
files as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fastgen.errors import FastgenError
from fastgen.io import atomic_write_bytes, atomic_write_json, check_writable, parse_json, read_json
from fastgen.pipelines.settings import draws_tokens
from fastgen.training.families import Family, family_of

_SHARD = 64
_Draw = Callable[[list[Any], list[torch.Generator], dict[str, Any]], Tensor]


class Shuffled:
    """Items in random order, reshuffled for every pass.

    Args:
        count: items of a pass.
        seed: of the order.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def place(self, index: int) -> int:
        """Position of item `index`: each pass visits every item once, in random order."""
        turn, step = divmod(index, self.count)
        if self._order[0] != turn:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
            self._order = turn, torch.randperm(self.count, generator=generator)
        return int(self._order[1][step])


class Samples(Shuffled):
    """Random access to the samples of a folder, reshuffled for every pass.

    Args:
        folder: written by `draw_samples`.
        seed: of the order.

    Raises:
        FastgenError: the folder has no samples, or not all of them.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        if not (folder / "samples.json").is_file():
            raise FastgenError(f"{folder}: has no samples (samples.json is missing)")
        super().__init__(int(read_json(folder / "samples.json")["count"]), seed)
        self.folder = folder
        if absent := [index for index in range(-(-self.count // _SHARD)) if not _shard(folder, index).is_file()]:
            raise FastgenError(f"{folder}: {len(absent)} shards are missing; resume the command that draws them")
        self._labels: dict[int, list[Any]] = {}

    size = None
    identity = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: latents (C, h, w), tokens (N,)."""
        with safe_open(_shard(self.folder, 0), "pt") as file:
            return tuple(file.get_slice("samples").get_shape()[1:])

    def batch(self, start: int, size: int) -> tuple[Tensor, list[Any]]:
        """Latents float32 [size, C, h, w], or tokens int64 [size, N], and labels of items start … start + size - 1."""
        pairs = [self._item(index) for index in range(start, start + size)]
        return torch.stack([sample for sample, _ in pairs]), [label for _, label in pairs]

    def _item(self, index: int) -> tuple[Tensor, Any]:
        shard, row = divmod(self.place(index), _SHARD)
        with safe_open(_shard(self.folder, shard), "pt") as file:  # memory-mapped: only this row is read
            sample = file.get_slice("samples")[row : row + 1][0]
            if shard not in self._labels:
                self._labels[shard] = parse_json(file.metadata()["labels"], f"labels of {_shard(self.folder, shard)}")
        return sample.float() if sample.is_floating_point() else sample.long(), self._labels[shard][row]


def draw_samples(
    pipe: DiffusionPipeline,
    folder: Path,
    labels: Sequence[str | int],
    count: int,
    *,
    seed: int = 0,
    batch_size: int = 8,
    report: Callable[[int, int], None] = lambda done, total: None,
    **settings: Any,
) -> Samples:
    """Draw the missing ones of `count` samples; sample k has label k mod len(labels).

    Args:
        pipe: a `ZImagePipeline` or one that draws tokens (labels are prompts), or a `DiTPipeline` (classes).
        folder: created if missing.
        labels: prompts or classes.
        count: total number of samples.
        seed: sample k has a generator seeded with seed + k.
        batch_size: samples per call.
        report: called with (done, total).
        settings: further arguments of the pipeline, `num_inference_steps`, `guidance_scale`, `height`, `width` …

    Raises:
        FastgenError: the folder has other samples, or is not writable.
        ValueError: no labels, count or batch size below 1, or another pipeline.
    """
    if not labels or count < 1 or batch_size < 1:
        raise ValueError(f"need labels, count >= 1 and batch_size >= 1; got {len(labels)}, {count}, {batch_size}")
    draw = _draw_tokens(pipe) if draws_tokens(type(pipe)) else _draw_latents(family_of(pipe))
    check_writable(folder)
    digest = hashlib.sha256(json.dumps(list(labels)).encode()).hexdigest()
    asked = {"count": count, "seed": seed, "labels_sha256": digest, "settings": settings}
    path = folder / "samples.json"
    if path.is_file() and read_json(path) != asked:
        raise FastgenError(f"{folder}: has samples with other labels or settings; choose another folder")
    atomic_write_json(path, asked)
    for index in range(-(-count // _SHARD)):
        numbers = range(index * _SHARD, min(count, (index + 1) * _SHARD))
        if not _shard(folder, index).is_file():
            _write_shard(draw, _shard(folder, index), labels, numbers, seed, batch_size, settings)
        report(numbers.stop, count)
    return Samples(folder, seed)


def _write_shard(
    draw: _Draw,
    path: Path,
    labels: Sequence[str | int],
    numbers: range,
    seed: int,
    batch_size: int,
    settings: dict[str, Any],
) -> None:
    parts, own = [], [labels[number % len(labels)] for number in numbers]
    for first in range(0, len(own), batch_size):
        part = own[first : first + batch_size]
        generators = [torch.Generator().manual_seed(seed + numbers[first + i]) for i in range(len(part))]
        parts.append(draw(part, generators, settings))
    atomic_write_bytes(path, save({"samples": torch.cat(parts).contiguous()}, {"labels": json.dumps(own)}))


def _draw_latents(family: Family) -> _Draw:
    return lambda labels, generators, settings: family.draw(labels, generators, settings).half()


def _draw_tokens(pipe: Any) -> _Draw:
    def draw(labels: list[Any], generators: list[torch.Generator], settings: dict[str, Any]) -> Tensor:
        drawn = pipe(labels, generator=generators, output_type="tokens", batch_invariant=False, **settings)
        tokens: Tensor = drawn.tokens.to("cpu", torch.int32)
        return tokens

    return draw


def _shard(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.safetensors"
