"""Latents, pixels and scores that are not numbers: candidates are dropped, and where all are, one error says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from micro_models import micro_dc_dit
from tiny_pipelines import loaded
from tiny_unets import ddim, tiny_sd
from torch import Tensor
from toy_search import TIMES, ToyDenoiser, run_policy, sum_of

from fastgen.errors import NotFiniteError
from fastgen.pipelines.dc_z_image import DCZImagePipeline
from fastgen.pipelines.generation import generate_images
from fastgen.pipelines.noise_search import NoFinitePicture, NoiseSearchPipeline, SearchInterrupted
from fastgen.pipelines.search.budget import Budget
from fastgen.pipelines.search.denoisers.base import Denoiser
from fastgen.pipelines.search.images import search_images
from fastgen.pipelines.search.interpolants import Prediction
from fastgen.pipelines.search.names import POLICIES, named_policy
from fastgen.pipelines.search.policies import Threshold, ValueSampling
from fastgen.pipelines.search.policy import Policy
from fastgen.pipelines.search.starts import BestOfN

SMALL: dict[str, dict[str, Any]] = {
    "threshold": {"tau": 0.4, "starts": 3, "patience": 6},
    "rbf": {"starts": 3},
    "svdd": {"candidates": 4},
    "code": {"candidates": 4},
    "smc": {"particles": 6},
    "zero-order": {"neighbours": 3},
    "search-over-paths": {"copies": 3, "steps": 2},
}
BAD = [math.nan, math.inf, -math.inf]
SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 3}


def small(name: str) -> Policy:
    return named_policy(name, **SMALL.get(name, {}))


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.float().mean(dim=(1, 2, 3)) / 255


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny_sd(ddim())


@contextmanager
def decoding(pipe: Any, change: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
    """`change` sees what the decoder draws, and its call."""
    calls: list[int] = []

    def hook(module: Any, given: Any, pixels: Tensor) -> Tensor:
        calls.append(1)
        return change(pixels, len(calls))

    handle = pipe.vae.decoder.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def spoiled(value: float, rows: slice = slice(None)) -> Callable[[Tensor, int], Tensor]:
    """One pixel of some rows."""

    def change(pixels: Tensor, call: int) -> Tensor:
        pixels = pixels.clone()
        pixels[rows, 0, 0, 0] = value
        return pixels

    return change


# ---- with a toy model: every policy ----


class Spoiled(ToyDenoiser):
    """Predicts `value` for some samples."""

    value, some = math.nan, 1.0
    times_only: tuple[float, ...] | None = None

    def predict(self, latents: Tensor, times: Tensor, which: Tensor) -> Prediction:
        said = super().predict(latents, times, which)
        bad = (latents.flatten(1).sum(1) * 997).frac().abs() < self.some
        if self.times_only is not None:
            bad &= torch.tensor([time in self.times_only for time in times.tolist()])
        return Prediction(torch.where(bad.view(-1, 1, 1, 1), self.value, said.clean), said.noise)


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("value", BAD)
def test_samples_that_are_not_numbers_are_dropped(name: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toy_search.ToyDenoiser", Spoiled)
    monkeypatch.setattr(Spoiled, "value", value)
    monkeypatch.setattr(Spoiled, "some", 0.15)
    found = 0
    for seed in range(4):
        ends, chains, _ = run_policy(small(name), max_nfe=160, seed=seed)
        best = max(ends, key=lambda end: (end.fault is None, end.last, end.score))
        found += best.fault is None and best.last
        assert best.fault is not None or bool(torch.isfinite(best.prediction.clean).all())
        assert any(visit.score == -math.inf for chain in chains for visit in chain.trace) or name == "best-of-n"
    assert found >= 3


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_search_of_nothing_but_such_samples_ends_with_a_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toy_search.ToyDenoiser", Spoiled)
    ends, chains, _ = run_policy(small(name), max_nfe=160)
    assert all(isinstance(end.fault, NotFiniteError) and "latents" in str(end.fault) for end in ends)
    assert chains[0].pool.nfe <= 160


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_scores_that_are_not_numbers_are_dropped(name: str, value: float, share: float) -> None:
    def verifier(pictures: Tensor, prompts: list[str]) -> Tensor:
        scores = sum_of(pictures, prompts)
        return torch.where((scores * 997).frac().abs() < share, value, scores)

    ends, chains, _ = run_policy(small(name), max_nfe=160, verifier=verifier)
    faults = [end.fault for end in ends]
    assert all(visit.score == -math.inf or not math.isinf(visit.score) for chain in chains for visit in chain.trace)
    if share == 1.0:
        assert all(fault is not None and "scores" in str(fault) for fault in faults)
    else:
        assert any(fault is None for fault in faults)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_previews_that_are_not_numbers_do_not_spoil_the_picture(name: str) -> None:
    def preview(denoiser: Any, said: Prediction) -> Tensor:
        raise NotFiniteError("pixels of the preview")

    ends, _, _ = run_policy(small(name), max_nfe=160, preview=preview)
    assert any(end.fault is None and end.last and math.isfinite(end.score) for end in ends)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_last_step_alone_may_fail(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toy_search.ToyDenoiser", Spoiled)
    monkeypatch.setattr(Spoiled, "times_only", TIMES[-1:])
    if name == "search-over-paths":
        return  # its steps are its own
    monkeypatch.setattr(Spoiled, "some", 0.3)
    ends, _, _ = run_policy(small(name), max_nfe=160, seed=seed)
    assert any(end.fault is None and end.last for end in ends)
    monkeypatch.setattr(Spoiled, "some", 1.0)
    ends, _, _ = run_policy(small(name), max_nfe=160, seed=seed)
    assert all(end.fault is not None for end in ends)


@pytest.mark.parametrize(("time", "rows"), [(0.56, 1), (0.495, 3)], ids=["seed", "copies"])
def test_a_path_that_fails_continues_from_the_best(time: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last evaluation of a seed, and of all copies of one, is spoiled: nothing is computed from it."""
    sizes: list[int] = []

    class First(ToyDenoiser):
        def predict(self, latents: Tensor, times: Tensor, which: Tensor) -> Prediction:
            assert torch.isfinite(latents).all()
            said = super().predict(latents, times, which)
            if math.isclose(float(times[0]), time):
                sizes.append(len(latents))
                said.clean[:rows] = math.nan
            return said

    monkeypatch.setattr("toy_search.ToyDenoiser", First)
    ends, _, denoiser = run_policy(small("search-over-paths"), max_nfe=160)
    assert sizes == [2 * rows] and ends[0].fault is None and len(denoiser.rows) == 2 + 2 * 4


@pytest.mark.parametrize("value", BAD)
def test_pixels_are_checked_without_a_decoder_of_the_pipeline(value: float) -> None:
    latents = torch.full((1, 1, 1, 2), value)
    with pytest.raises(NotFiniteError, match="pixels"):
        Denoiser.pictures(ToyDenoiser(TIMES), Prediction(latents, torch.zeros_like(latents)))


# ---- with pipelines ----


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("policy", [BestOfN(n=3), ValueSampling(chains=1, candidates=3), Threshold(0.9)])
def test_pixels_that_are_not_numbers_are_one_error(sd: Any, policy: Policy, value: float) -> None:
    search = NoiseSearchPipeline(sd, brightness, policy)
    with decoding(sd, spoiled(value)), pytest.raises(NotFiniteError, match="pixels are not numbers"):
        search("a cat", generator=torch.Generator().manual_seed(0), max_nfe=30, **SIZE)
    with decoding(sd, spoiled(value, slice(1, None))):
        output = search("a cat", generator=torch.Generator().manual_seed(0), max_nfe=30, **SIZE)
    assert output.reports[0].finished and np.asarray(output.images[0]).std() > 2
    (handles,) = [sd.vae.decoder._forward_hooks]
    assert not handles


@pytest.mark.parametrize("value", BAD)
def test_latents_that_are_not_numbers_are_one_error(sd: Any, value: float) -> None:
    def spoil(module: Any, given: Any, out: Any) -> Any:
        return (torch.full_like(out[0], value),)

    handle = sd.unet.register_forward_hook(spoil)
    try:
        with pytest.raises(NotFiniteError, match="latents are not numbers"):
            NoiseSearchPipeline(sd, brightness, BestOfN(n=2))("a cat", **SIZE)
        with pytest.raises(NotFiniteError, match="not numbers"):
            NoiseSearchPipeline(sd, policy=None)("a cat", **SIZE)
        with pytest.raises(NotFiniteError, match="not numbers"):
            list(generate_images(sd, ["a cat"], [0], height=32, width=32, steps=2))
    finally:
        handle.remove()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_without_a_search_pixels_are_checked_before_they_are_clamped(sd: Any, value: float, output_type: str) -> None:
    with decoding(sd, spoiled(value)):
        with pytest.raises(NotFiniteError, match="pixels are not numbers"):
            NoiseSearchPipeline(sd, policy=None)("a cat", output_type=output_type, **SIZE)
        with pytest.raises(NotFiniteError, match="pixels are not numbers"):
            list(generate_images(sd, ["a cat"], [0], height=32, width=32, steps=2))


@pytest.mark.parametrize("value", BAD)
def test_pipelines_with_dynamic_chunking_return_no_such_picture(micro_dc: Path, value: float) -> None:
    z = loaded(DCZImagePipeline, micro_dc)
    size: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2}
    for pipe, prompt, arguments in ((z, "a ring", size), (micro_dc_dit(), [1], {"num_inference_steps": 2})):
        for output_type in ("pil", "np"):
            with decoding(pipe, spoiled(value)), pytest.raises(NotFiniteError, match="pixels"):
                pipe(prompt, output_type=output_type, **arguments)
        assert pipe(prompt, **arguments).images[0].size
    latents = torch.full((1, z.transformer.in_channels, 4, 4), value)
    for output_type in ("latent", "pil"):
        with pytest.raises(NotFiniteError, match="latents"):
            z("a ring", latents=latents, output_type=output_type, **size)


def test_prompts_that_have_a_picture_keep_it(sd: Any) -> None:
    def verifier(images: Tensor, prompts: list[str]) -> Tensor:
        return torch.tensor([math.nan if "bad" in prompt else 0.5 for prompt in prompts])

    search = NoiseSearchPipeline(sd, verifier, BestOfN(n=2))
    with pytest.raises(NoFinitePicture, match="scores") as caught:
        search(["a cat", "a bad cat", "a dog"], **SIZE)
    output = caught.value.output
    assert caught.value.found == [0, 2] and output is not None
    assert [report.prompt for report in output.reports] == ["a cat", "a dog"] and len(output.images) == 2
    made = []
    with pytest.raises(NotFiniteError):
        for picture in search_images(
            sd, verifier, BestOfN(n=2), ["a bad cat", "a dog"], [0, 1], budget=Budget(20), batch_invariant=False,
            steps=2, height=32, width=32,
        ):  # fmt: skip
            made.append((picture.prompt, picture.seed, picture.interrupted))
    assert made == [("a dog", 1, False)]


@pytest.mark.parametrize(
    "answer",
    [["a", "b"], None, "good", torch.ones(2, 2), torch.ones(3), torch.ones(2, dtype=torch.complex64), 0.5],
)
def test_a_verifier_that_gives_no_numbers_is_named(sd: Any, answer: Any) -> None:
    with pytest.raises(SearchInterrupted, match="verifier: returned") as caught:
        NoiseSearchPipeline(sd, lambda images, prompts: answer, BestOfN(n=2))("a cat", **SIZE)
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_interrupted_search_keeps_no_picture_that_is_not_a_number(sd: Any) -> None:
    calls: list[int] = []

    def verifier(images: Tensor, prompts: list[str]) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return torch.full((len(images),), math.nan if len(calls) == 1 or everything else 0.5)

    for everything in (True, False):
        calls.clear()
        search = NoiseSearchPipeline(sd, verifier, ValueSampling(chains=1, candidates=2))
        with pytest.raises(SearchInterrupted) as caught:
            search("a cat", **SIZE)
        output = caught.value.output
        assert (output is None) == everything
        if output is not None:
            assert output.reports[0].score == 0.5 and output.reports[0].stopped == "interrupted"
