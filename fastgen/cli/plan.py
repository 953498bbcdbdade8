"""Which pictures a run of `fastgen generate` makes, under which names, and which of them are there already.

Names. ``-o out.png`` gives out.png, or out-0.png, out-1.png … for several pictures. A folder gets 00000-0.png:
line of the prompts file, picture of that line. Each picture has a sidecar of the same name in JSON.

Finished pictures. A picture counts as finished when its sidecar contains the sha256 of its file and the very settings
that this run has for it; then it is kept. A picture that was made otherwise is replaced if it was named by ``-o``, as
any tool replaces its output; in the folder of a prompts file it stops the run, because a mix of settings there is a
mistake.
The picture of a search that was interrupted is not finished: it is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.errors import FastgenError
from fastgen.io import check_format, file_sha256, read_object

if TYPE_CHECKING:
    from fastgen.pipelines.loading.checkpoint import Checkpoint

__all__ = [
    "Job",
    "image_paths",
    "is_finished",
    "model_digest",
    "other_batches",
    "plan_jobs",
    "read_prompts_file",
    "read_sidecar",
    "unfinished_jobs",
    "weights_digest",
    "whole_batches",
]

#: Format of sidecars.
SIDECAR_FORMAT = 1

# Bytes read at the start, in the middle and at the end of each weight file to identify a training state.
_SAMPLE = 2**16


@dataclass(frozen=True, slots=True)
class Job:
    """One picture to be made.

    Attributes:
        settings: all that its pixels depend on, except for rounding, as in the sidecar.
        batch: the pictures it is drawn together with, and its place among them; rounding depends on that.
    """

    prompt: str
    seed: int
    image: Path
    settings: dict[str, Any] = field(default_factory=dict)
    batch: str = ""

    @property
    def sidecar(self) -> Path:
        return self.image.with_suffix(".json")

    @property
    def files(self) -> list[str]:
        """Names of all files that belong to the picture."""
        return [self.image.with_suffix(suffix).name for suffix in (".png", ".json", ".map.png", ".tree.png")]


def read_prompts_file(path: Path) -> list[str]:
    """Prompts of a UTF-8 file, one per line; a byte-order mark and Windows line ends are fine.

    Raises:
        FastgenError: the file cannot be read, is not UTF-8, or has a line without text; names the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FastgenError(f"prompts file {path}: {(error.strerror or str(error)).lower()}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise FastgenError(f"prompts file {path}: line {number} is not UTF-8 text") from error
    # str.splitlines would also cut at form feeds and other characters that are not line ends.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise FastgenError(f"prompts file {path}: it is empty")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise FastgenError(f"prompts file {path}: line {number} is empty")
        if any(ord(char) < 32 and char != "\t" for char in line):
            raise FastgenError(f"prompts file {path}: line {number} contains control characters, it is not text")
    return lines


def image_paths(output: Path, prompts: int, num_images: int, *, folder: bool) -> list[list[Path]]:
    """Picture names of each prompt; see the module's text.

    Args:
        output: the ``-o`` argument.
        folder: `output` is a folder, not the name of a picture.
    """
    if not folder:
        if num_images == 1:
            return [[output]]
        return [[output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(num_images)]]
    digits = max(5, len(str(prompts - 1)))
    return [[output / f"{p:0{digits}d}-{i}.png" for i in range(num_images)] for p in range(prompts)]


def plan_jobs(
    prompts: list[str], seed: int, settings: dict[str, Any], paths: list[list[Path]], batch_size: int = 1
) -> list[Job]:
    """Jobs in order: all pictures of the first prompt, then of the second. Picture i of a prompt uses seed + i.

    Args:
        batch_size: how many are drawn together; a rerun that has a part of them to make draws all of them again.
    """
    jobs = [
        Job(prompt, seed + i, path, {"prompt": prompt, "seed": seed + i, **settings})
        for prompt, row in zip(prompts, paths, strict=True)
        for i, path in enumerate(row)
    ]
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        if len(batch) > 1:
            name = hashlib.sha256(json.dumps([(job.prompt, job.seed) for job in batch]).encode()).hexdigest()[:12]
            jobs[start : start + batch_size] = [replace(job, batch=f"{name}-{i}") for i, job in enumerate(batch)]
    return jobs


def whole_batches(jobs: list[Job], todo: list[Job]) -> list[Job]:
    """`todo`, and what was planned to be drawn together with them: the same batches whichever pictures exist."""
    batches = {job.batch.partition("-")[0] for job in todo} - {""}
    images = {job.image for job in todo}
    return [job for job in jobs if job.image in images or job.batch.partition("-")[0] in batches]


def other_batches(kept: list[Job]) -> int:
    """How many of the kept pictures were drawn in other batches than this run has."""
    return sum(read_sidecar(job).get("batch", "") != job.batch for job in kept)


def unfinished_jobs(jobs: list[Job], *, overwrite: bool, strict: bool) -> list[Job]:
    """Jobs that are not finished.

    Args:
        overwrite: make all of them, also those that exist.
        strict: a picture that was made with other settings is an error, not to be replaced.

    Raises:
        FastgenError: `strict` and a picture of other settings, or of unknown ones, is in the way; or a sidecar in a
            format that this version does not read.
    """
    return jobs if overwrite else list(_unfinished(jobs, strict))


def _unfinished(jobs: list[Job], strict: bool) -> Iterator[Job]:
    for job in jobs:
        if (sidecar := read_sidecar(job)).get("format") is not None:
            check_format(sidecar["format"], job.sidecar, SIDECAR_FORMAT)
        if is_finished(job):
            continue
        # With the same settings it is the picture of a search that was interrupted.
        if strict and job.image.is_file() and _recorded_settings(job) != job.settings:
            raise FastgenError(f"{job.image} is in the way: {_difference(job)}; use --overwrite or another folder")
        yield job


def is_finished(job: Job) -> bool:
    """The picture is that of its sidecar, was made with these settings, and nothing interrupted the search for it."""
    sidecar = read_sidecar(job)
    if sidecar.get("settings") != job.settings or sidecar.get("interrupted"):
        return False
    try:
        return file_sha256(job.image) == sidecar.get("sha256")
    except FastgenError:
        return False


def read_sidecar(job: Job) -> dict[str, Any]:
    """The sidecar of the picture; empty if it is missing or not a JSON object."""
    try:
        return read_object(job.sidecar)
    except FastgenError:
        return {}


def _recorded_settings(job: Job) -> dict[str, Any] | None:
    settings = read_sidecar(job).get("settings")
    return settings if isinstance(settings, dict) else None


def _difference(job: Job) -> str:
    """Why the picture that is there does not count as finished."""
    recorded = _recorded_settings(job)
    if recorded is None:
        return "it has no sidecar with its settings"
    for name in {**job.settings, **recorded}:
        there, here = recorded.get(name), job.settings.get(name)
        if there != here:
            return f"it was made with {name} {there!r}, this run has {here!r}"
    return "its settings differ"


def model_digest(checkpoint: Checkpoint, drafter: Path | None = None) -> str:
    """Tells which weights these are: the Hub revision, or a digest of the weight files."""
    if checkpoint.hub_id is not None:
        return checkpoint.root.name
    own = [] if drafter is None or drafter == checkpoint.drafter else [drafter]
    return weights_digest([*checkpoint.folders, *own])


def weights_digest(folders: Iterable[Path], *others: str) -> str:
    """Tells one training state from another by a digest of samples of the weight files, and of others' patterns.

    Samples, because reading all bytes of a large model would take longer than a picture; training changes every
    tensor, and the samples with it.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for pattern in ("*.safetensors", "*.bin", *others) for path in folder.rglob(pattern)):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
            with path.open("rb") as file:
                for start in (0, size // 2, max(0, size - _SAMPLE)):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]
