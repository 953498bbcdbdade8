"""Sums of verifiers.

A sum of weighted scores depends on one picture only, so a threshold means the same in every batch. Sums of ranks do
not, which is why there are none here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.evaluation.verifiers.base import Verifier

__all__ = ["Weighted"]


class Weighted(Verifier):
    """The sum of weight * (score - mean) / std over several verifiers.

    Its range is known where the ranges of all its verifiers are.

    Args:
        terms: pairs of a verifier and its weight; a negative weight asks for low scores.
        moments: mean and standard deviation of each verifier's scores, measured beforehand, which put verifiers of
            different scales on one; None: scores as they are.

    Raises:
        ValueError: no terms, a weight that is not finite or is 0, or moments that do not fit.
    """

    def __init__(
        self, terms: Sequence[tuple[Verifier, float]], moments: Sequence[tuple[float, float]] | None = None
    ) -> None:
        if not terms:
            raise ValueError("terms: needs at least one verifier")
        if moments is None:
            moments = [(0.0, 1.0)] * len(terms)
        if len(moments) != len(terms):
            raise ValueError(f"moments: needs {len(terms)}, one pair for each verifier, got {len(moments)}")
        for verifier, weight in terms:
            if not math.isfinite(weight) or weight == 0:
                raise ValueError(f"terms: the weight of {verifier.name} must be finite and not 0, got {weight}")
        for mean, std in moments:
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                raise ValueError(f"moments: needs finite means and standard deviations above 0, got {(mean, std)}")
        self.terms = tuple(terms)
        self.moments = tuple(moments)
        self.name = " + ".join(f"{weight:g}*{verifier.name}" for verifier, weight in terms)
        self.weights = ", ".join(verifier.weights for verifier, _ in terms)
        self.range = self._bounds()

    def to(self, device: str | torch.device) -> Weighted:
        for verifier, _ in self.terms:
            verifier.to(device)
        return self

    def _bounds(self) -> tuple[float, float] | None:
        low = high = 0.0
        for (verifier, weight), (mean, std) in zip(self.terms, self.moments, strict=True):
            if verifier.range is None:
                return None
            ends = sorted(weight * (end - mean) / std for end in verifier.range)
            low, high = low + ends[0], high + ends[1]
        return low, high

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        # Added in float64 on the CPU: the verifiers may lie on different devices.
        total = torch.zeros(len(prompts), dtype=torch.float64)
        for (verifier, weight), (mean, std) in zip(self.terms, self.moments, strict=True):
            total += weight * (verifier.score(images, prompts).double().cpu() - mean) / std
        return total
