"""GenEval result files: one JSON object an image, as the official scorer writes and its summary reads them."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.metadata import Metadata, check_distinct
from fastgen.evaluation.geneval.rules import ImageResult, summarize
from fastgen.io import parse_json, read_limited

DETECTORS = {
    "hf": "GenEval (HF-M2F)",
    "mmdet-converted": "GenEval (converted M2F)",
    "shapes": "ShapesWorld-GenEval",
    "unknown": "GenEval (detector unknown)",
}
"""Name of a detector -> name of its scores. Plain "GenEval" is what the official scorer measures; agreement with it
was measured for none of these, see docs/evaluation.md."""


def benchmark_name(detector: str) -> str:
    """Name of the scores that a detector gives; of "shapes@128" that of "shapes" with the size of the pictures."""
    base, at, size = detector.partition("@")
    return DETECTORS.get(base, f"GenEval (detector={base})") + at + size


_MAX_BYTES = 1 << 30  # of a results file
_FIELDS = ("filename", "tag", "prompt", "correct", "reason", "metadata")


@dataclass(frozen=True, slots=True)
class Verdicts:
    """A results file, line by line.

    Attributes:
        names: file names of the images.
        prompts, results: the prompts and the verdicts.
        detectors: names of the detectors that gave them.
    """

    names: list[str]
    prompts: list[Metadata]
    results: list[ImageResult]
    detectors: set[str]


def read_results(path: str | Path) -> Verdicts:
    """A results file of the official scorer or of ours.

    Images with equal metadata belong to one prompt, as in the official summary.

    Raises:
        FastgenError: the file cannot be read, is empty, has a line that is no verdict, judges an image twice, or
            has other metadata for a prompt than before; the message starts with `path:line`.
    """
    path = Path(path)
    try:
        text = read_limited(path, _MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FastgenError(f"{path}: cannot be read: {error}") from error
    if not text.strip():
        raise FastgenError(f"{path}: has no verdicts")
    found = Verdicts([], [], [], set())
    lines: dict[str, int] = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        try:
            record, metadata = _verdict(line)
            image = posixpath.normpath(record["filename"])
            if image in lines:
                raise ValueError(f"filename: {record['filename']!r} was judged in line {lines[image]} already")
        except ValueError as error:  # FastgenError is one
            raise FastgenError(f"{path}:{number}: {error}") from error
        lines[image] = number
        found.names.append(record["filename"])
        found.prompts.append(metadata)
        reasons = tuple((record["reason"] or "").splitlines())
        found.results.append(ImageResult(metadata.tag, metadata.to_json(), record["correct"], reasons))
        found.detectors.add(record.get("detector", "unknown"))
    # Other metadata under the same prompt of a task would count as another prompt.
    first = {item.to_json(): (item, number) for number, item in reversed(list(enumerate(found.prompts, start=1)))}
    distinct = sorted(first.values(), key=lambda entry: entry[1])
    check_distinct([item for item, _ in distinct], [f"{path}:{number}" for _, number in distinct])
    return found


def _verdict(line: str) -> tuple[dict[str, Any], Metadata]:
    """A line of a results file.

    Raises:
        ValueError: it is no verdict; the message names the field.
    """
    record = parse_json(line, "the line")
    if not isinstance(record, dict) or not all(name in record for name in _FIELDS):
        raise ValueError(f"needs a JSON object with {', '.join(_FIELDS)}")
    if not isinstance(record["correct"], bool):
        raise ValueError(f"correct: needs true or false, got {record['correct']!r}"[:200])
    for name in ("filename", "tag", "prompt", "reason", "detector"):
        empty = name == "reason" and record[name] is None
        if not isinstance(record.get(name, "unknown"), str) and not empty:
            raise ValueError(f"{name}: needs a text, got {record[name]!r}"[:200])
    held = record["metadata"]
    metadata = Metadata.from_dict(parse_json(held, "metadata") if isinstance(held, str) else held)
    if metadata.tag != record["tag"]:
        raise ValueError(f"tag {record['tag']!r} is another than that of its metadata, {metadata.tag!r}")
    return record, metadata


def prompt_table(prompts: Sequence[Metadata], results: Sequence[ImageResult]) -> list[dict[str, Any]]:
    """How many images of every prompt are correct, in order of appearance; `prompts` names the prompt of each result.

    Returns:
        JSON-ready rows {"id", "tag", "prompt", "correct", "images"}
    """
    rows: dict[int | str, dict[str, Any]] = {}
    for metadata, result in zip(prompts, results, strict=True):
        start = {"id": result.prompt_id, "tag": result.tag, "prompt": metadata.prompt, "correct": 0, "images": 0}
        row = rows.setdefault(result.prompt_id, start)
        row["correct"] += result.correct
        row["images"] += 1
    return list(rows.values())


def summarize_file(path: str | Path) -> dict[str, Any]:
    """Scores of a results file, JSON-ready, with the name of its detector; a file that does not say so, as those of
    the official scorer, has detector "unknown".

    Raises:
        FastgenError: see `read_results`; or the file mixes detectors.
    """
    verdicts = read_results(path)
    if len(verdicts.detectors) > 1:
        raise FastgenError(f"{path}: mixes verdicts of the detectors {', '.join(sorted(verdicts.detectors))}")
    name = next(iter(verdicts.detectors))
    table = prompt_table(verdicts.prompts, verdicts.results)
    for number, row in enumerate(table):
        row["id"] = number
    summary = summarize(verdicts.results).as_dict()
    return {
        "benchmark": benchmark_name(name),
        "detector_name": name,
        **summary,
        "prompts": table,
        "verdicts": str(path),
    }
