"""Samples of a forward pass follow free memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from toy_search import ToyDenoiser, run_policy

from fastgen.pipelines.search.fitting import Fit, fitting
from fastgen.pipelines.search.interpolants import Prediction
from fastgen.pipelines.search.starts import BestOfN


@pytest.mark.parametrize("limit", [1, 3, 8])
def test_rows_that_do_not_fit_are_halved_and_what_fits_is_remembered(limit: int) -> None:
    sizes: list[int] = []

    def work(part: Sequence[int]) -> list[int]:
        sizes.append(len(part))
        if len(part) > limit:
            raise torch.OutOfMemoryError("full")
        return list(part)

    fit = Fit()
    assert sum(fitting(range(8), fit, work), []) == list(range(8))
    sizes.clear()
    assert sum(fitting(range(8), fit, work), []) == list(range(8))
    assert max(sizes) <= limit and fit.rows == {1: 1, 3: 2, 8: None}[limit]


def test_one_row_that_does_not_fit_is_an_error() -> None:
    def work(part: Sequence[int]) -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        fitting(range(4), Fit(), work)


def test_a_search_in_little_memory_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = BestOfN()
    (plain,), _, _ = run_policy(policy, max_nfe=40)
    velocity, pictures = ToyDenoiser.velocity, ToyDenoiser.pictures

    def small(self: ToyDenoiser, latents: torch.Tensor, times: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        if len(latents) > 3:
            raise torch.OutOfMemoryError("full")
        return velocity(self, latents, times, which)

    def few(self: ToyDenoiser, prediction: Prediction, which: torch.Tensor | None = None) -> torch.Tensor:
        if len(prediction.clean) > 1:
            raise torch.OutOfMemoryError("full")
        return pictures(self, prediction, which)

    monkeypatch.setattr(ToyDenoiser, "velocity", small)
    monkeypatch.setattr(ToyDenoiser, "pictures", few)
    (found,), _, denoiser = run_policy(policy, max_nfe=40)
    assert found.score == plain.score and torch.equal(found.latents, plain.latents)
    assert 0 < max(denoiser.rows) <= 3 and denoiser.decodes.rows == 1
