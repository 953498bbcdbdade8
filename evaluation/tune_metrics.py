"""Metrics of `fastgen tune`; higher is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastgen.errors import FastgenError, one_line

__all__ = ["METRICS", "Metric", "load_metric", "ssim"]

Metric = Callable[[list[Image.Image], list[str], list[Image.Image]], list[float]]
"""Scores of pictures, given their prompts and the stock pictures of the same seeds; higher is better."""

METRICS = ("ssim", "lpips", "shapes")
"""Those that are no verifier."""


def load_metric(name: str, prompts: list[str], device: str = "cpu") -> Metric:
    """A metric by its name: one of `METRICS`, or a verifier.

    Args:
        name: "ssim"; "lpips"; "shapes"; or as `load_verifier` takes it.
        prompts: that will be drawn.
        device: of its network.

    Raises:
        FastgenError: no such metric; its weights cannot be loaded; or it cannot judge these prompts.
    """
    if name == "ssim":
        return ssim
    if name == "lpips":
        return _lpips(device)
    if name == "shapes":
        return _shapes(prompts, device)
    from fastgen.evaluation.verifiers.base import picture_scores
    from fastgen.evaluation.verifiers.names import load_verifier

    try:
        verifier = load_verifier(name, device)
    except FastgenError as error:
        known = "" if "is unknown" not in str(error) else f"; or one of {', '.join(METRICS)}"
        raise FastgenError(f"--metric: {error}{known}") from error

    def scored(images: list[Image.Image], prompts: list[str], stock: list[Image.Image]) -> list[float]:
        return list(picture_scores(verifier, map(_array, images), prompts))

    return scored


def ssim(images: list[Image.Image], prompts: list[str], stock: list[Image.Image]) -> list[float]:
    """Structural similarity to the stock pictures, 1 for equal ones."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    pairs = zip(map(_tensor, images), map(_tensor, stock), strict=True)
    return [float(structural_similarity_index_measure(ours, theirs, data_range=1.0)) for ours, theirs in pairs]


def _lpips(device: str) -> Metric:
    """Perceptual distance (AlexNet) to the stock pictures, negative: 0 for equal ones."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        network: Any = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)
    except Exception as error:  # torchvision is not installed, or its weights cannot be downloaded
        raise FastgenError(f"--metric: lpips needs torchvision and its AlexNet weights: {one_line(error)}") from error

    @torch.no_grad()
    def scored(images: list[Image.Image], prompts: list[str], stock: list[Image.Image]) -> list[float]:
        pairs = zip(map(_tensor, images), map(_tensor, stock), strict=True)
        return [-float(network(ours.to(device), theirs.to(device))) for ours, theirs in pairs]

    return scored


def _shapes(prompts: list[str], device: str) -> Metric:
    """Verdicts of ShapesWorld-GenEval, 1 for a correct picture; the mean is its score where tasks are equally many."""
    from fastgen.evaluation.geneval.rules import evaluate_image
    from fastgen.evaluation.geneval.shapes_checker import ShapesChecker
    from fastgen.evaluation.shapesworld import shapes_prompts

    known = {item.prompt: item for item in shapes_prompts()}
    if unknown := [prompt for prompt in prompts if prompt not in known]:
        raise FastgenError(f"--metric: shapes judges ShapesWorld evaluation prompts only, {unknown[0]!r} is not one")
    checker = ShapesChecker(device=device)

    def scored(images: list[Image.Image], prompts: list[str], stock: list[Image.Image]) -> list[float]:
        found = checker.detect([_array(image) for image in images])
        return [float(evaluate_image(known[text], each).correct) for text, each in zip(prompts, found, strict=True)]

    return scored


def _array(image: Image.Image) -> np.ndarray:
    return np.array(image.convert("RGB"))


def _tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(_array(image)).permute(2, 0, 1)[None].float() / 255
