"""The images of a folder in GenEval's layout and their verdicts; processes share the work, and it can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fastgen.data.scenes import IMAGE_SIZE
from fastgen.errors import FastgenError
from fastgen.evaluation.chunks import ChunkStore, run_chunks
from fastgen.evaluation.distributed import Group, OnProgress
from fastgen.evaluation.geneval.detections import ColorClassifier, ObjectDetector
from fastgen.evaluation.geneval.metadata import Metadata, check_distinct, check_vocabulary, read_metadata
from fastgen.evaluation.geneval.rules import ImageResult, evaluate_image
from fastgen.evaluation.images import MAX_FILE_BYTES, decode_image, image_size, name_skipped
from fastgen.io import parse_json, read_limited

_SAMPLE = re.compile(r"\d+\.png")
_PROMPT = re.compile(r"\d+")
_CHUNK = 16  # images in memory while scoring, and at most this many are judged again after an interruption
_FORMAT = 1  # of kept verdicts


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a folder in GenEval's layout, and the prompt it answers."""

    path: Path
    prompt_id: int
    metadata: Metadata

    def read(self) -> bytes:
        """The bytes of the file.

        Raises:
            FastgenError: it cannot be read, or is too large for an image.
        """
        return read_limited(self.path, MAX_FILE_BYTES)

    def size(self) -> tuple[int, int]:
        """Width and height in pixels, upright.

        Raises:
            FastgenError: the file is no readable image.
        """
        return image_size(self.read(), str(self.path))

    def load(self) -> np.ndarray:
        """uint8 [H, W, 3], turned as its EXIF orientation says.

        Raises:
            FastgenError: the file is no readable image.
        """
        return decode_image(self.read(), str(self.path), upright=True)


def read_samples(
    folder: str | Path, detector: ObjectDetector | None = None, colors: ColorClassifier | None = None
) -> list[Sample]:
    """Every image under `folder`, prompts and images in numeric order.

    Args:
        detector: when given, a class or colour it cannot report is an error.
        colors: names the colours, where the detector does not.

    Raises:
        FastgenError: the folder is missing or has no prompt folder, a prompt folder has no valid metadata or no
            image, a prompt names what the detector cannot see, or a task has a prompt twice.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FastgenError(f"{folder}: no such folder of images")
    homes = prompt_folders(folder)
    if not homes:
        raise FastgenError(f"{folder}: has no prompt folders (00000/metadata.jsonl, 00000/samples/0000.png, ...)")
    samples: list[Sample] = []
    prompts: list[Metadata] = []
    for home in homes:
        items = read_metadata(home / "metadata.jsonl")
        if len(items) != 1:
            raise FastgenError(f"{home / 'metadata.jsonl'}: needs exactly one line, has {len(items)}")
        if detector is not None:
            try:
                check_vocabulary(items[0], detector.class_names, getattr(colors or detector, "color_names", None))
            except ValueError as error:
                raise FastgenError(f"{home / 'metadata.jsonl'}: {error}") from error
        found = sample_files(home)
        if not found:
            raise FastgenError(f"{home / 'samples'}: has no image")
        prompts.append(items[0])
        samples += [Sample(path, int(home.name), items[0]) for path in found]
    check_distinct(prompts, [home / "metadata.jsonl" for home in homes])
    return samples


def prompt_folders(folder: Path) -> list[Path]:
    """The folders of prompts (00000, 00001, ...), by number."""
    found = (path for path in folder.iterdir() if path.is_dir() and _PROMPT.fullmatch(path.name))
    return sorted(found, key=lambda path: int(path.name))


def sample_files(home: Path) -> list[Path]:
    """The images of a prompt's folder, by number."""
    images = home / "samples"
    names = [path.name for path in images.iterdir()] if images.is_dir() else []
    found = {name for name in names if _SAMPLE.fullmatch(name)}
    name_skipped(images, (name for name in names if name not in found and not name.startswith(".")))
    return sorted((images / name for name in found), key=lambda path: (int(path.stem), path.name))


def judge_samples(
    samples: Sequence[Sample],
    detector: ObjectDetector,
    colors: ColorClassifier | None = None,
    *,
    group: Group | None = None,
    work: str | os.PathLike[str] | None = None,
    identity: str = "",
    on_progress: OnProgress | None = None,
) -> list[ImageResult]:
    """The verdict of the GenEval rules on every sample, in order; `colors` None takes the detector's own colours.

    Args:
        group: processes that share the work; all of them get all verdicts.
        work: folder where finished verdicts are kept, so that an interrupted call can resume; None keeps none. Whoever
            writes the result removes them, see `verdict_store`.
        identity: what the verdicts depend on besides images and prompts (weights of the detector ...); kept
            verdicts are used for the same only.

    Raises:
        FastgenError: an image cannot be read; the message names it.
        PeerFailed: another process failed.
    """
    group = group or Group()
    store = verdict_store(samples, work, identity, group)
    report_done = group.counter("check", len(samples), on_progress)

    def compute(items: range) -> list[ImageResult]:
        part = samples[items.start : items.stop]
        images = [sample.load() for sample in part]
        found = detector.detect(images)
        results = []
        for sample, image, detections in zip(part, images, found, strict=True):
            classify = None if colors is None else partial(colors.classify, image)
            results.append(evaluate_image(sample.metadata, detections, classify, prompt_id=sample.prompt_id))
        return results

    own = run_chunks(
        len(samples),
        _CHUNK,
        group=group,
        store=store,
        compute=compute,
        encode=lambda results: json.dumps([asdict(result) for result in results]).encode(),
        decode=_decode_results,
        on_done=lambda items: report_done(len(items)),
    )
    parts = dict(part for parts in group.share(group.gather(dict(own))) for part in parts.items())
    return [result for number in sorted(parts) for result in parts[number]]


def verdict_store(
    samples: Sequence[Sample],
    work: str | os.PathLike[str] | None,
    identity: str,
    group: Group | None = None,
) -> ChunkStore:
    """Where `judge_samples` keeps verdicts of these very images, to be discarded when the result is written."""
    if work is None:
        return ChunkStore(None, "verdicts", None)
    group = group or Group()
    content = None
    if group.is_main:
        digest = hashlib.sha256()
        for sample in samples:
            digest.update(f"{sample.prompt_id} {sample.path.name} {sample.metadata.to_json()}\n".encode())
            digest.update(sample.read())
        content = digest.hexdigest()
    return ChunkStore(work, "verdicts", [_FORMAT, group.share(content), identity, _CHUNK])


def _decode_results(data: bytes, items: range) -> list[ImageResult]:
    try:
        records = parse_json(data, "a chunk of verdicts")
        results = [ImageResult(**{**record, "reasons": tuple(record["reasons"])}) for record in records]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"no verdicts: {error}") from error
    if len(results) != len(items):
        raise ValueError(f"{len(results)} verdicts for {len(items)} images")
    return results


def results_jsonl(
    folder: str | Path, samples: Sequence[Sample], results: Sequence[ImageResult], detector: str
) -> bytes:
    """The verdicts as the official scorer writes them, one JSON object a line, and the name of the detector; names of
    files are relative to `folder`."""
    lines = []
    for sample, result in zip(samples, results, strict=True):
        record = {
            "filename": sample.path.relative_to(folder).as_posix(),
            "tag": result.tag,
            "prompt": sample.metadata.prompt,
            "correct": result.correct,
            "reason": result.reason,
            "metadata": sample.metadata.to_json(),
            "details": json.dumps(result.details),
            "detector": detector,
        }
        lines.append(json.dumps(record))
    return "".join(line + "\n" for line in lines).encode()


def size_name(samples: Sequence[Sample]) -> str:
    """The suffix of a ShapesWorld score's name for the size of its pictures: empty for 64x64, else "@128" for
    squares, "@192x128" (width x height), or "@mixed".

    Raises:
        FastgenError: a file is no readable image.
    """
    sizes = {sample.size() for sample in samples}
    if len(sizes) != 1:
        return "@mixed" if sizes else ""
    width, height = sizes.pop()
    if (width, height) == (IMAGE_SIZE, IMAGE_SIZE):
        return ""
    return f"@{width}" if width == height else f"@{width}x{height}"


def spread(total: int, count: int) -> list[int]:
    """`count` indices (or all, when fewer) evenly spread over range(total)."""
    count = min(count, total)
    return [index * total // count for index in range(count)]
