"""ShapesWorld-GenEval and FD-shapes of a folder of images, and the renderer as the model that bounds both."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fastgen.accounting import phase
from fastgen.data.captions import evaluation_captions, evaluation_prompts
from fastgen.data.scenes import IMAGE_SIZE, sample_scene
from fastgen.data.shapes import render
from fastgen.environment import environment
from fastgen.errors import FastgenError
from fastgen.evaluation.distributed import Group, OnProgress
from fastgen.evaluation.fid.fd_shapes import FDShapes
from fastgen.evaluation.fid.readers import FolderSource
from fastgen.evaluation.geneval.metadata import Metadata, first_of_each_task
from fastgen.evaluation.geneval.rules import summarize
from fastgen.evaluation.geneval.scoring import GenEvalScore
from fastgen.evaluation.geneval.shapes_checker import ShapesChecker, ShapesModel, fingerprint
from fastgen.evaluation.geneval.verdict_files import DETECTORS, benchmark_name, prompt_table
from fastgen.evaluation.report import contact_sheet
from fastgen.evaluation.samples import judge_samples, read_samples, size_name, spread, verdict_store

DETECTOR = "shapes"
"""Name of the embedded detector, which goes into every result."""
BENCHMARK = DETECTORS[DETECTOR]
RENDERS = "renders"
"""Name of the pseudo-model that draws every prompt with the ShapesWorld renderer: the ceiling of both scores."""
SHEET_IMAGES = 64


def shapes_prompts(limit: int | None = None) -> list[Metadata]:
    """The 360 evaluation prompts, or the first `limit` of each task.

    Raises:
        ValueError: limit < 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: needs an integer >= 1, got {limit}")
    items = [Metadata.from_dict(data) for data in evaluation_prompts()]
    return first_of_each_task(items, limit)


def render_prompts(prompts: Sequence[str], seeds: Sequence[int], size: int = IMAGE_SIZE) -> Iterator[Image.Image]:
    """One render of `size` x `size` pixels per (evaluation prompt, seed): what a perfect model would draw.

    Raises:
        FastgenError: a prompt is none of the evaluation prompts, so its scene is not known.
    """
    known = {caption.text: index for index, caption in enumerate(evaluation_captions())}
    for prompt in prompts:
        if prompt not in known:
            raise FastgenError(f"{RENDERS}: {prompt!r} is no ShapesWorld evaluation prompt")
    for prompt, seed in zip(prompts, seeds, strict=True):
        index = known[prompt]
        scene = sample_scene(evaluation_captions()[index].spec, random.Random(f"{seed}/{prompt}"))
        images, _ = render([scene], [(seed, index)], size)
        yield Image.fromarray(images[0])


class FolderScore(GenEvalScore):
    """Scores of a folder; `data` also has fd_shapes."""

    def sheet(self, *, captions: bool = False, count: int = SHEET_IMAGES) -> Image.Image:
        """The first image of each of `count` prompts spread over the tasks, with green or red verdict bars."""
        first: dict[int, int] = {}
        for index, sample in enumerate(self.samples):
            first.setdefault(sample.prompt_id, index)
        firsts = list(first.values())
        chosen = [firsts[k] for k in spread(len(firsts), count)]
        return contact_sheet(
            [Image.fromarray(self.samples[i].load()) for i in chosen],
            [self.samples[i].metadata.prompt for i in chosen] if captions else None,
            correct=[self.results[i].correct for i in chosen],
        )


def score_folder(
    folder: str | Path,
    model: ShapesModel,
    *,
    device: str = "cpu",
    allow_small: bool = False,
    fd: FDShapes | None = None,
    group: Group | None = None,
    work: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> FolderScore:
    """ShapesWorld-GenEval and FD-shapes of the images under `folder` (GenEval's layout).

    Pictures of another size than 64x64 are judged scaled down to it; the names of their scores say the size, as in
    "ShapesWorld-GenEval@128". A set too small for FD-shapes still gets its task scores; `fd_shapes` then says why it
    has no value.

    Args:
        model: the detector network, see `load_detector`.
        allow_small: compute FD-shapes of fewer than 2 x 128 images too.
        fd: the distance to use; the standard protocol when None.
        group: processes that share the work; all of them get the scores.
        work: folder where finished parts are kept until `FolderScore.finish`, so that an interrupted call can resume.

    Raises:
        FastgenError: the folder cannot be read, see `read_samples`.
        PeerFailed: another process failed.
    """
    group = group or Group()
    checker = ShapesChecker(model, device=device)
    samples = read_samples(folder, checker)
    weights = fingerprint(model)
    stores = [verdict_store(samples, work, weights, group=group)]
    with phase("check"):
        results = judge_samples(samples, checker, group=group, work=work, identity=weights, on_progress=on_progress)
    size = size_name(samples)
    name = DETECTOR + size
    data: dict[str, Any] = {"benchmark": benchmark_name(name), **summarize(results).as_dict()}
    with phase("fd"):

        def reference_progress(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress("reference", min(done * group.size, total), total)

        distance = fd or FDShapes(model, size=size, device=device, on_progress=reference_progress)
        try:
            distance.check_size(len(samples), allow_small)
        except FastgenError as error:
            data["fd_shapes"] = {"value": None, "protocol": distance.protocol, "reason": str(error)}
        else:
            source = FolderSource(folder)
            report_done = group.counter("features", len(source), on_progress)
            result, store = distance.measure(
                source, allow_small=allow_small, group=group, work=work, on_done=report_done
            )
            data["fd_shapes"] = result.as_dict()
            stores.append(store)
    prompts = prompt_table([sample.metadata for sample in samples], results)
    data |= {"detector_name": name, "detector": weights, "prompts": prompts, "environment": environment()}
    return FolderScore(data, samples, results, stores)
