"""GenEval of a folder of images: every verdict, the scores, and what they may be called."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.accounting import phase
from fastgen.environment import environment
from fastgen.errors import FastgenError
from fastgen.evaluation.chunks import ChunkStore
from fastgen.evaluation.distributed import Group, OnProgress
from fastgen.evaluation.geneval.detections import ColorClassifier, ObjectDetector
from fastgen.evaluation.geneval.metadata import Metadata
from fastgen.evaluation.geneval.prompts import IMAGES_PER_PROMPT, official_prompts
from fastgen.evaluation.geneval.rules import ImageResult, summarize
from fastgen.evaluation.geneval.verdict_files import prompt_table
from fastgen.evaluation.images import check_image_file
from fastgen.evaluation.report import scores_markdown
from fastgen.evaluation.samples import (
    Sample,
    judge_samples,
    read_samples,
    results_jsonl,
    size_name,
    verdict_store,
)
from fastgen.io import atomic_write_json, atomic_write_many


@dataclass(frozen=True, slots=True)
class Judge:
    """A detector with its colour classifier, and what goes into every result about them.

    Attributes:
        benchmark: name of the scores.
        name: of the detector: hf, mmdet-converted, shapes.
        description: JSON-ready: weights and their sha256, ...; verdicts of equal descriptions are interchangeable.
        colors: None when the detector names colours itself.
        self_test: the result of `self_test`, None if it did not run.
        official: judges the 553 prompts of the benchmark; what departs from its protocol is then noted.
    """

    benchmark: str
    name: str
    detector: ObjectDetector
    description: dict[str, Any]
    colors: ColorClassifier | None = None
    self_test: dict[str, Any] | None = None
    official: bool = True


@dataclass(frozen=True, slots=True)
class GenEvalScore:
    """Scores of a folder.

    Attributes:
        data: JSON-ready: benchmark, detector, tasks, overall, standard errors, counts, prompts, environment.
        samples, results: every image and its verdict, in the same order.
        stores: finished parts that were kept.
    """

    data: dict[str, Any]
    samples: list[Sample]
    results: list[ImageResult]
    stores: Sequence[ChunkStore] = ()

    def finish(self, folder: Path, target: Path | None, more: dict[str, Any]) -> dict[str, Any]:
        """The scores of the images in `folder` with `more`; written into `target` if there is one. What was kept for
        resuming is removed."""
        report = {**self.data, **more, "images": str(folder)}
        if target is not None:
            self.write(folder, target, report)
            report["results"] = str(target / "scores.json")
        for store in self.stores:
            store.discard()
        return report

    def write(self, folder: Path, target: Path, report: dict[str, Any]) -> None:
        """Write the verdicts on the images in `folder`, and the scores in `report`, into `target`."""
        verdicts = results_jsonl(folder, self.samples, self.results, report["detector_name"])
        title = f"# {report['benchmark']}\n\ndetector={report['detector_name']}\n\n"
        page = (title + scores_markdown(report)).encode()
        atomic_write_many([(target / "results.jsonl", verdicts), (target / "scores.md", page)])
        atomic_write_json(target / "scores.json", report)


def score_images(
    folder: str | Path,
    judge: Judge,
    *,
    expected: Sequence[Metadata] | None = None,
    partial: bool = False,
    group: Group | None = None,
    work: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> GenEvalScore:
    """GenEval of the images under `folder`, in the official layout.

    Args:
        expected: the prompts that must be there; None takes the 553 official ones when the folder has no other
            prompt than theirs, and else the prompts that are there.
        partial: also score a part of them, or unequal numbers of images; `data["partial"]` then says what is
            missing.
        group: processes that share the work; all of them get the scores.
        work: folder where finished parts are kept until `GenEvalScore.finish`; an interrupted call resumes from it.

    Raises:
        FastgenError: the folder cannot be read, a prompt names what cannot be detected, an image is damaged, or images
            are missing; the message names the file.
        PeerFailed: another process failed.
    """
    group = group or Group()
    samples = read_samples(folder, judge.detector, judge.colors)
    gaps = missing_images(samples, expected)
    if gaps and not partial:
        raise FastgenError(f"{folder}: {gaps}; score what is there with --partial")
    group.main_first(lambda: check_whole(samples))
    identity = str(judge.description)
    store = verdict_store(samples, work, identity, group=group)
    with phase("check"):
        results = judge_samples(
            samples,
            judge.detector,
            judge.colors,
            group=group,
            work=work,
            identity=identity,
            on_progress=on_progress,
        )
    # Only ShapesWorld knows sizes: GenEval's detectors scale every picture to one.
    size = size_name(samples) if judge.name == "shapes" else ""
    data = {
        "benchmark": judge.benchmark + size,
        "detector_name": judge.name + size,
        "judge": judge.description,
        "detector": judge.description.get("detector_sha256", ""),
        "self_test": judge.self_test,
        "partial": gaps or None,
        "differs": differs_from_protocol(samples) if judge.official else None,
        **summarize(results).as_dict(),
        "prompts": prompt_table([sample.metadata for sample in samples], results),
        "environment": environment(),
    }
    return GenEvalScore(data, samples, results, [store])


def missing_images(samples: Sequence[Sample], expected: Sequence[Metadata] | None = None) -> str:
    """Missing parts of a folder, in words; "" when it is complete. `expected` as in `score_images`."""
    counts = Counter(sample.metadata.to_json() for sample in samples)
    if expected is None:
        official = {item.to_json(): item for item in official_prompts()}
        expected = list(official.values()) if all(line in official for line in counts) else []
    absent = [item for item in expected if item.to_json() not in counts]
    words = []
    if absent:
        words.append(f"{len(absent)} of {len(expected)} prompts have no images, the first is {absent[0].prompt!r}")
    folders = Counter(sample.prompt_id for sample in samples)
    most = max(folders.values())
    short = {number: count for number, count in folders.items() if count < most}
    if short:
        first = min(short)
        words.append(
            f"{len(short)} of {len(folders)} prompts have fewer than {most} images, {first:05d} has {short[first]}"
        )
    return "; ".join(words)


def check_whole(samples: Sequence[Sample]) -> None:
    """Look at the checksums of all files before hours are spent on some of them.

    Raises:
        FastgenError: names the first damaged file and how many there are.
    """
    damaged = []
    for sample in samples:
        try:
            check_image_file(sample.read(), str(sample.path))
        except FastgenError as error:
            damaged.append(str(error))
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise FastgenError(damaged[0] + more)


def differs_from_protocol(samples: Sequence[Sample]) -> str | None:
    """How a folder departs from the official protocol, 4 images of each of the 553 prompts; None when it does not."""
    counts = Counter(sample.metadata.to_json() for sample in samples)
    if set(counts) != {item.to_json() for item in official_prompts()}:
        return "other prompts than the 553 official ones"
    if set(counts.values()) != {IMAGES_PER_PROMPT}:
        return (
            f"{min(counts.values())} to {max(counts.values())} images a prompt, the benchmark has {IMAGES_PER_PROMPT}"
        )
    return None
