"""One process of an evaluation that the tests start, kill and start again: it draws, judges and measures."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from evaluation_fakes import PixelModel
from PIL import Image

from fastgen.evaluation.distributed import Group
from fastgen.evaluation.fid.evaluate import FidSettings, evaluate_images
from fastgen.evaluation.fid.extractors import ShapesNetwork
from fastgen.evaluation.fid.fd_shapes import FDShapes
from fastgen.evaluation.fid.readers import CallbackSource
from fastgen.evaluation.fid.reference import Reference
from fastgen.evaluation.runner import EvaluationRun, RunSettings, results_jsonl
from fastgen.evaluation.shapesworld import render_prompts, score_folder, shapes_prompts
from fastgen.io import atomic_write_bytes, atomic_write_json

SETTINGS = RunSettings(model="renders", model_fingerprint="renders", images_per_prompt=4)
PROMPTS = shapes_prompts(2)  # 12, with 48 images: three chunks of verdicts


class SlowModel(PixelModel):
    """Takes its time, so that a kill falls into every stage."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def detect(self, images: torch.Tensor) -> list:
        time.sleep(self.seconds * len(images))
        return super().detect(images)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds * len(images))
        return super().features(images)


def join(rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def measure(folder: str, rank: int, size: int, port: int) -> None:
    """Every metric of 700 noise pictures against 600 others, kept in `folder`/measured.json."""
    join(rank, size, port)
    group, out = Group.from_environment(silence=6.0), Path(folder)
    sources = []
    for seed, count in ((1, 700), (2, 600)):
        images = np.random.default_rng(seed).integers(0, 256 - 20 * seed, (count, 64, 64, 3), dtype=np.uint8)
        sources.append(CallbackSource(count, images.__getitem__, identity=str(seed), name=f"noise {seed}"))
    metrics = ("fd-shapes", "kd-shapes", "precision-shapes", "recall-shapes")
    with group.reporting():
        data, _ = evaluate_images(
            sources[0],
            FidSettings(metrics, bootstrap=20, subset_size=100),
            reference=Reference("noise 2", sources[1]),
            extractors={"shapes": ShapesNetwork(PixelModel())},
            group=group,
            cache=out / f"cache-{size}",
            work=out / f"cache-{size}",
        )
        if group.is_main:
            atomic_write_json(out / "measured.json", data["metrics"])


def work(
    folder: str,
    rank: int,
    size: int,
    port: int,
    seconds: float = 0.0,
    fail_at: int | None = None,
    settings: RunSettings = SETTINGS,
) -> None:
    """The whole evaluation in `folder`; `fail_at` makes the drawing of that image of this process fail."""
    join(rank, size, port)

    def draw(prompts: list[str], seeds: list[int]) -> Iterator[Image.Image]:
        for number, image in enumerate(render_prompts(prompts, seeds)):
            time.sleep(seconds)
            if number == fail_at:
                raise OSError(f"the disk of process {rank} is on fire")
            yield image

    group = Group.from_environment(silence=6.0)
    out = Path(folder)
    try:
        with group.reporting():
            run = EvaluationRun(out / "run", PROMPTS, settings, group)
            run.generate(draw)
            model = SlowModel(seconds)
            fd = FDShapes(model, n_reference=64, seed=9, cache_dir=out / "cache")
            score = score_folder(run.folder, model, fd=fd, group=group, work=run.folder / ".work")
            if group.is_main:
                lines = results_jsonl(run.folder, score.samples, score.results, "shapes")
                atomic_write_bytes(run.folder / "results.jsonl", lines)
                atomic_write_json(out / "scores.json", {k: v for k, v in score.data.items() if k != "environment"})
                score.finish(run.folder, None, {})
    except Exception as error:
        (out / f"error-{rank}.json").write_text(json.dumps([type(error).__name__, str(error)]))
        raise SystemExit(3) from error


def command(folder: str, rank: int, size: int, port: int, seconds: float = 0.0) -> None:
    """`fastgen eval geneval` itself, with slowed renderer and detector, in `folder`/run."""
    join(rank, size, port)
    import fastgen.evaluation.shapesworld as shapesworld
    from fastgen.cli.main import run
    from fastgen.evaluation.geneval.shapes_checker import ShapesModel

    render, detect, meet = shapesworld.render_prompts, ShapesModel.detect, Group.from_environment

    def slow_render(prompts: list[str], seeds: list[int]) -> Iterator[Image.Image]:
        for image in render(prompts, seeds):
            time.sleep(seconds)
            yield image

    def slow_detect(self: ShapesModel, images: torch.Tensor) -> list:
        time.sleep(seconds * len(images))
        return detect(self, images)

    shapesworld.render_prompts = slow_render
    ShapesModel.detect = slow_detect  # type: ignore[method-assign]
    Group.from_environment = lambda device="cpu": meet(device, silence=6.0)  # type: ignore[method-assign, assignment]
    options = ["--detector", "shapes", "--model", "renders", "--limit", "2", "--images-per-prompt", "4"]
    raise SystemExit(run(["eval", "geneval", *options, "--out", str(Path(folder) / "run")]))
