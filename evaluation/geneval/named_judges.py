"""The judges of `fastgen eval geneval`, by name: detector, colour classifier, self-test, and the name of the score."""

from __future__ import annotations

from pathlib import Path

from fastgen.evaluation.geneval.scoring import Judge
from fastgen.evaluation.geneval.self_test import folder_photos, rendered_photos, scikit_photos, self_test
from fastgen.evaluation.shapesworld import BENCHMARK, DETECTOR


def load_judge(
    detector: str | None = None,
    color_model: str | None = None,
    *,
    device: str = "cpu",
    photos: str | Path | None = None,
    test: bool = True,
) -> Judge:
    """A judge that has passed its self-test.

    Args:
        detector: "shapes" for the embedded one, else Hub id or folder of a Mask2Former; None takes the published one.
        color_model: tag or file of open_clip's ViT-L-14, or an open_clip folder; None takes "openai".
        photos: folder of photographs for the self-test; None takes those of scikit-image.
        test: whether the self-test runs.

    Raises:
        FastgenError: weights are missing, or the detector fails its self-test.
    """
    if detector == DETECTOR:
        return _shapes_judge(device, test)
    from fastgen.evaluation.geneval.colors import TAG, ClipColors
    from fastgen.evaluation.geneval.mask2former import HUB_ID, Mask2FormerDetector
    from fastgen.evaluation.geneval.prompts import CLASSES
    from fastgen.evaluation.geneval.rules import THRESHOLD

    # Before weights load, so that missing files cost no time.
    pictures = None if not test else scikit_photos() if photos is None else folder_photos(photos, CLASSES)
    found = Mask2FormerDetector.load(detector or HUB_ID, device=device, min_score=THRESHOLD)
    colors = ClipColors.load(color_model or TAG, device=device)
    passed = None if pictures is None else self_test(found, pictures)
    description = {
        "detector": found.weights,
        "detector_sha256": found.fingerprint(),
        "color_model": colors.weights,
        "color_model_sha256": colors.fingerprint(),
    }
    return Judge(found.benchmark, found.name, found, description, colors, passed)


def _shapes_judge(device: str, test: bool) -> Judge:
    from fastgen.evaluation.geneval.shapes_checker import ShapesChecker, fingerprint, load_detector

    model = load_detector(device=device)
    checker = ShapesChecker(model, device=device)
    passed = self_test(checker, rendered_photos()) if test else None
    description = {"detector": checker.name, "detector_sha256": fingerprint(model)}
    return Judge(BENCHMARK, DETECTOR, checker, description, None, passed, official=False)
