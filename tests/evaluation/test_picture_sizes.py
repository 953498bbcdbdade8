"""ShapesWorld at other sizes than 64x64: judged as well, and named apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_fakes import PixelModel
from PIL import Image

import fastgen.evaluation.shapesworld as shapesworld
from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.evaluation.fid.fd_shapes import FDShapes
from fastgen.evaluation.geneval.metadata import Metadata
from fastgen.evaluation.geneval.named_judges import load_judge
from fastgen.evaluation.geneval.rules import evaluate_image
from fastgen.evaluation.geneval.scoring import score_images
from fastgen.evaluation.geneval.shapes_checker import ShapesChecker, load_detector
from fastgen.evaluation.geneval.verdict_files import benchmark_name, summarize_file
from fastgen.evaluation.samples import read_samples, results_jsonl, size_name
from fastgen.evaluation.shapesworld import render_prompts, score_folder, shapes_prompts
from fastgen.evaluation.verifiers.names import load_verifier


@pytest.fixture(scope="module")
def prompts() -> list[Metadata]:
    return shapes_prompts(4)


def write(folder: Path, prompts: list[Metadata], images: list[Image.Image]) -> Path:
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        home = folder / f"{number:05d}"
        (home / "samples").mkdir(parents=True)
        (home / "metadata.jsonl").write_text(prompt.to_json() + "\n")
        image.save(home / "samples" / "0000.png")
    return folder


def renders(prompts: list[Metadata], size: int) -> list[Image.Image]:
    return list(render_prompts([prompt.prompt for prompt in prompts], [5] * len(prompts), size))


@pytest.mark.parametrize("size", [64, 128, 192])
def test_detector_and_verifier_judge_renders_of_any_multiple(prompts: list[Metadata], size: int) -> None:
    images = [np.asarray(image) for image in renders(prompts, size)]
    assert {image.shape for image in images} == {(size, size, 3)}
    found = ShapesChecker().detect(images)
    assert all(evaluate_image(prompt, seen).correct for prompt, seen in zip(prompts, found, strict=True))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    verifier = load_verifier("shapes-verifier")
    assert float(verifier.score(pixels, [prompt.prompt for prompt in prompts]).min()) > 0.5
    other = [prompt.prompt for prompt in prompts[1:] + prompts[:1]]
    assert float((verifier.score(pixels, other) < 0.5).float().mean()) > 0.7


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ([(64, 64)] * 3, ""),
        ([(128, 128)] * 3, "@128"),
        ([(192, 128)] * 3, "@192x128"),
        ([(64, 64), (128, 128), (128, 128)], "@mixed"),
        ([(96, 96)] * 3, "@96"),
    ],
)
def test_scores_of_another_size_have_another_name(
    tmp_path: Path, prompts: list[Metadata], sizes: list[tuple[int, int]], name: str
) -> None:
    folder = write(tmp_path / "o", prompts[:3], [Image.new("RGB", size) for size in sizes])
    assert size_name(read_samples(folder)) == name
    fd = FDShapes(PixelModel(), n_reference=64, size=name, cache_dir=tmp_path / "cache")
    assert fd.protocol.startswith(f"FD-shapes{name}[")
    score = score_folder(folder, PixelModel(), fd=fd)
    assert score.data["benchmark"] == f"ShapesWorld-GenEval{name}"
    assert score.data["detector_name"] == f"shapes{name}"
    (tmp_path / "r.jsonl").write_bytes(
        results_jsonl(folder, score.samples, score.results, score.data["detector_name"])
    )
    read = summarize_file(tmp_path / "r.jsonl")
    assert (read["benchmark"], read["detector_name"]) == (f"ShapesWorld-GenEval{name}", f"shapes{name}")


def test_a_folder_is_compared_with_renders_of_its_size(
    tmp_path: Path, prompts: list[Metadata], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Small(FDShapes):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, n_reference=64, cache_dir=tmp_path / "cache", **kwargs)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(shapesworld, "FDShapes", Small)
    names = []
    for size in (64, 128):
        folder = write(tmp_path / str(size), prompts, renders(prompts, size))
        score = score_folder(folder, load_detector(), allow_small=True)
        assert score.data["overall"] == 1.0
        names.append(score.data["fd_shapes"]["protocol"])
        assert made[-1].reference.images.fetch(0).shape == (size, size, 3)
    assert names[0].replace("FD-shapes", "FD-shapes@128") == names[1]
    # The other entrance to the same judge names its scores the same way.
    judged = score_images(folder, load_judge("shapes", test=False), partial=True)
    assert (judged.data["benchmark"], judged.data["detector_name"]) == ("ShapesWorld-GenEval@128", "shapes@128")


def test_results_of_two_sizes_are_not_compared(
    tmp_path: Path, prompts: list[Metadata], capsys: pytest.CaptureFixture[str]
) -> None:
    for size in (64, 128):
        folder = write(tmp_path / str(size), prompts, renders(prompts, size))
        assert run(["eval", "shapes", "--images", str(folder), "--out", str(tmp_path / f"s{size}")]) == 0
        assert ("@128" in capsys.readouterr().out) == (size == 128)
    assert run(["eval", "compare", str(tmp_path / "s64/scores.json"), str(tmp_path / "s128/scores.json")]) == 2
    error = capsys.readouterr().err
    assert "contains ShapesWorld-GenEval@128: they do not compare" in error and error.count("\n") == 1


def test_names_of_other_detectors_stay() -> None:
    assert benchmark_name("hf") == "GenEval (HF-M2F)"
    assert benchmark_name("mine") == "GenEval (detector=mine)"


def test_a_file_that_is_no_picture_is_named(tmp_path: Path, prompts: list[Metadata]) -> None:
    folder = write(tmp_path / "o", prompts[:1], [Image.new("RGB", (64, 64))])
    (folder / "00000/samples/0000.png").write_bytes(b"no picture")
    with pytest.raises(FastgenError, match=r"0000\.png: not a readable image: its format is none of"):
        size_name(read_samples(folder))
