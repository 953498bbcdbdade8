"""The self-test: a detector that does not see must not judge."""

from __future__ import annotations

import builtins
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_mask2former import sees

import fastgen.evaluation.geneval.mask2former as mask2former
from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.detections import Detections
from fastgen.evaluation.geneval.mask2former import Mask2FormerDetector
from fastgen.evaluation.geneval.prompts import CLASSES
from fastgen.evaluation.geneval.self_test import Photo, folder_photos, rendered_photos, scikit_photos, self_test
from fastgen.evaluation.geneval.shapes_checker import ShapesChecker


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> Mask2FormerDetector:
    """It sees a cat everywhere, in small pictures."""
    monkeypatch.setattr(mask2former, "SHORT_SIDE", 64)
    return Mask2FormerDetector(sees("cat"))


def photo(expected: str, name: str = "p.png") -> Photo:
    return Photo(name, expected, np.full((40, 40, 3), 90, np.uint8))


def test_passes_on_what_it_sees_and_refuses_the_rest(detector: Mask2FormerDetector) -> None:
    report = self_test(detector, [photo("cat"), photo("cat", "q.png")])
    assert [row["name"] for row in report["photos"]] == ["p.png", "q.png"]
    assert all(row["score"] > 0.99 for row in report["photos"]) and report["threshold"] == 0.9
    with pytest.raises(FastgenError, match=r"must see a dog in q.png above 0.9, it gave 0.000 and saw cat at 1.000"):
        self_test(detector, [photo("cat"), photo("dog", "q.png")])


@pytest.mark.parametrize(("score", "passes"), [(0.9, False), (0.89, False), (0.91, True)])
def test_the_threshold_is_strict(score: float, passes: bool) -> None:
    found = Detections(("cat", "dog"), np.array([score, 0.99]), np.array([[0, 0, 1, 1]] * 2))
    seer = SimpleNamespace(detect=lambda images: [found])
    if passes:
        assert self_test(seer, [photo("cat")])["photos"][0]["score"] == score
    else:
        with pytest.raises(FastgenError, match="saw dog at 0.990 at best"):
            self_test(seer, [photo("cat")])


def test_a_blind_detector_is_refused() -> None:
    blind = SimpleNamespace(detect=lambda images: [Detections((), [], [])])
    with pytest.raises(FastgenError, match="it gave 0.000 and saw nothing"):
        self_test(blind, [photo("cat")])


def test_the_embedded_detector_passes_on_renders() -> None:
    report = self_test(ShapesChecker(), rendered_photos())
    assert len({row["expected"] for row in report["photos"]}) == 8
    assert min(row["score"] for row in report["photos"]) > 0.95


def test_photographs_of_a_folder(tmp_path: Path) -> None:
    for name in ("cat.png", "fire_hydrant-2.JPG", "notes.txt"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / name, format="PNG")
    photos = folder_photos(tmp_path, CLASSES)
    assert [(item.name, item.expected) for item in photos] == [
        ("cat.png", "cat"),
        ("fire_hydrant-2.JPG", "fire hydrant"),
    ]
    Image.new("RGB", (4, 4)).save(tmp_path / "unicorn.png")
    with pytest.raises(FastgenError, match="unicorn.png: 'unicorn' is no class"):
        folder_photos(tmp_path, CLASSES)
    (tmp_path / "unicorn.png").unlink()
    (tmp_path / "dog.png").write_bytes((tmp_path / "cat.png").read_bytes()[:40])
    with pytest.raises(FastgenError, match="dog.png: not a readable image"):
        folder_photos(tmp_path, CLASSES)
    for folder in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(FastgenError, match="has no photographs"):
            folder_photos(folder, CLASSES)


def test_photographs_of_scikit_image() -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed (extra: geneval)")
    photos = scikit_photos()
    assert [item.expected for item in photos] == ["cat", "person", "cup"]
    assert all(item.image.dtype == np.uint8 and item.image.shape[2] == 3 for item in photos)


def test_without_scikit_image_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: object) -> object:
        if name.partition(".")[0] == "skimage":
            raise ImportError("No module named 'skimage'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(FastgenError, match="pip install scikit-image.*--self-test-photos.*--no-self-test"):
        scikit_photos()
