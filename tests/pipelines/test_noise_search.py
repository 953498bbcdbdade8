"""The pipeline around a stock one: what it returns, what it leaves alone, and what an interruption leaves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from tiny_pipelines import loaded
from tiny_unets import ddim, tiny_sd, with_scheduler
from torch import Tensor

from fastgen.pipelines.loading.checkpoint import embedded_folder
from fastgen.pipelines.noise_search import NoiseSearchPipeline, SearchInterrupted
from fastgen.pipelines.search.engine import Round
from fastgen.pipelines.search.policies import Threshold, ValueSampling
from fastgen.pipelines.search.starts import BestOfN

CALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def tiny() -> ZImagePipeline:
    return loaded(ZImagePipeline, embedded_folder("tiny"))


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    """A verifier that anyone can check."""
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, 64, 64) and len(images) == len(prompts)
    means = images.float().mean(dim=(2, 3))
    return (means[:, 0] - means[:, 1:].mean(dim=1)) / 255


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_without_a_policy_it_is_the_stock_call(tiny: ZImagePipeline) -> None:
    search = NoiseSearchPipeline(tiny, policy=None)
    ours = search("a red circle", generator=seeded(0)[0], output_type="np", **CALL).images
    stock = tiny("a red circle", generator=seeded(0)[0], output_type="np", **CALL).images
    assert np.array_equal(ours, stock) and search.loss == "exact"
    assert search.vae is tiny.vae and search.scheduler is tiny.scheduler


def test_one_of_one_is_the_stock_picture(tiny: ZImagePipeline) -> None:
    search = NoiseSearchPipeline(tiny, redness, BestOfN(n=1))
    ours = search("a red circle", generator=seeded(3)[0], output_type="np", **CALL).images[0]
    stock = tiny("a red circle", generator=seeded(3)[0], output_type="np", **CALL).images[0]
    assert np.abs(ours - stock).max() < 0.5 / 255 + 2e-3  # rounded to bytes


def test_each_prompt_has_its_own_negative_prompt(tiny: ZImagePipeline) -> None:
    prompts, negatives = ["a heart", "a ring"], ["a green star", "red"]
    search = NoiseSearchPipeline(tiny, redness, BestOfN(n=1))
    found = search(prompts, negative_prompt=negatives, generator=seeded(1, 2), output_type="np", **CALL).images
    for i, prompt in enumerate(prompts):
        given = {"negative_prompt": negatives[i], "generator": seeded(1 + i)[0], "output_type": "np", **CALL}
        assert np.abs(found[i] - tiny(prompt, **given).images[0]).max() < 0.5 / 255 + 2e-3


@pytest.mark.parametrize(
    "policy",
    [
        BestOfN(n=4),
        pytest.param(ValueSampling(chains=1, candidates=3), marks=pytest.mark.slow),
        Threshold(0.2),
    ],
)
def test_a_search_finds_pictures_with_high_scores(tiny: ZImagePipeline, policy: Any) -> None:
    prompts = ["a heart", "a ring"]
    rounds: list[Round] = []
    output = NoiseSearchPipeline(tiny, redness, policy)(
        prompts, generator=seeded(1, 2), max_nfe=60, on_round=rounds.append, **CALL
    )
    visits = [visit for found in rounds for visit in found.visits]
    for place, report in enumerate(output.reports):  # the rounds have shown the whole trees
        for chain, tree in enumerate(report.trees):
            assert [visit.row() for *where, visit in visits if where == [place, chain]] == tree
    assert rounds[-1].running == 0
    plain = NoiseSearchPipeline(tiny, redness, Threshold(-math.inf))(
        prompts, generator=seeded(1, 2), max_nfe=60, **CALL
    )
    for report, base, image in zip(output.reports, plain.reports, output.images, strict=True):
        assert report.score is not None and base.score is not None and report.score >= base.score - 1e-6
        again = redness(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], [report.prompt])
        assert float(again) == pytest.approx(report.score, abs=1e-6)
        assert report.nfe <= 60 and report.evaluations * 2 == report.nfe and report.finished
        assert report.policy == policy.description and len(report.path) == 4
        assert sum(report.tries_by_time) == report.evaluations == sum(map(len, report.trees))
    stats = output.stats
    assert stats.nfe == sum(report.nfe for report in output.reports)
    assert stats.verifier_calls > 0 and {"denoise", "decode", "verifier", "text"} <= set(stats.seconds)
    assert plain.reports[0].tries == [[1, 1, 1]] and plain.reports[0].forced == 0


def test_prompts_do_not_depend_on_each_other(tiny: ZImagePipeline) -> None:
    search = NoiseSearchPipeline(tiny, redness, Threshold(0.05, wave=2))
    together = search(["a heart", "two rings"], generator=seeded(1, 2), max_nfe=40, output_type="np", **CALL)
    alone = search("two rings", generator=seeded(2)[0], max_nfe=40, output_type="np", **CALL)
    assert together.reports[1].path == alone.reports[0].path and together.reports[1].tries == alone.reports[0].tries
    assert np.abs(together.images[1] - alone.images[0]).max() <= 1 / 255


@pytest.mark.parametrize("sampler", ["euler-maruyama", "rollover"])
def test_samplers(tiny: ZImagePipeline, sampler: Any) -> None:
    output = NoiseSearchPipeline(tiny, redness, Threshold(-math.inf))(
        "a red star", generator=seeded(0)[0], max_nfe=8, sampler=sampler, output_type="np", **CALL
    )
    assert np.isfinite(output.images).all() and output.images[0].std() > 0.02 and output.reports[0].nfe == 8


@pytest.mark.parametrize("how", ["crash", "interrupt", "shape"])
def test_what_was_found_before_an_error_is_kept(tiny: ZImagePipeline, how: str) -> None:
    calls = []

    def verifier(images: Tensor, prompts: list[str]) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            if how == "shape":
                return torch.zeros(len(images), 2)
            raise KeyboardInterrupt if how == "interrupt" else RuntimeError("the verifier fell over")
        return redness(images, prompts)

    with pytest.raises(SearchInterrupted) as caught:
        NoiseSearchPipeline(tiny, verifier)("a heart", generator=seeded(0)[0], max_nfe=80, **CALL)
    output = caught.value.output
    assert output is not None and output.reports[0].stopped == "interrupted"
    assert np.array(output.images[0]).std() > 2  # a picture, if a preview
    assert isinstance(caught.value.__cause__, {"crash": RuntimeError, "shape": ValueError}.get(how, KeyboardInterrupt))
    with pytest.raises(SearchInterrupted) as early:
        NoiseSearchPipeline(tiny, lambda images, prompts: 1 / 0)("a heart", max_nfe=80, **CALL)
    assert early.value.output is None


def test_time_ends_a_search_with_a_whole_picture(tiny: ZImagePipeline) -> None:
    output = NoiseSearchPipeline(tiny, redness, Threshold(9.0))(
        "a heart", generator=seeded(0)[0], max_seconds=0.05, **CALL
    )
    assert output.reports[0].stopped == "time" and output.reports[0].finished
    target = NoiseSearchPipeline(tiny, redness, BestOfN(wave=1))(
        "a heart", generator=seeded(0)[0], max_nfe=400, target_score=-1.0, **CALL
    )
    assert target.reports[0].nfe == 8


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"prompt": []}, "prompt"),
        ({"max_nfe": 5}, "max_nfe"),
        ({"max_nfe": True}, "max_nfe"),
        ({"max_seconds": 0}, "max_seconds"),
        ({"target_score": math.nan}, "target_score"),
        ({}, "would not end"),
        ({"max_nfe": 80, "sampler": "magic"}, "sampler"),
        ({"max_nfe": 80, "output_type": "latent"}, "output_type"),
        ({"max_nfe": 80, "batch_size": 0}, "batch_size"),
        ({"max_nfe": 80, "generator": seeded(0, 1)}, "generator"),
        ({"max_nfe": 80, "pipeline_kwargs": {"colour": 1}}, "colour"),
        ({"max_nfe": 80, "pipeline_kwargs": {"height": 32}}, "height is an argument of the search"),
    ],
)
def test_bad_arguments(tiny: ZImagePipeline, arguments: dict[str, Any], word: str) -> None:
    asked: list[int] = []

    def verifier(images: Tensor, prompts: list[str]) -> Tensor:
        asked.append(len(images))
        return redness(images, prompts)

    with pytest.raises(ValueError, match=word):
        NoiseSearchPipeline(tiny, verifier)(**{"prompt": "a heart", **CALL, **arguments})
    assert not asked


def test_bad_parts(tiny: ZImagePipeline) -> None:
    with pytest.raises(ValueError, match="cannot be searched"):
        NoiseSearchPipeline(torch.nn.Linear(1, 1), redness)
    with pytest.raises(ValueError, match="verifier"):
        NoiseSearchPipeline(tiny, None)
    with pytest.raises(ValueError, match="policy"):
        NoiseSearchPipeline(tiny, redness, "luck")


def test_a_model_of_discrete_times() -> None:
    """Stable Diffusion with DDIM: a search runs, and what needs levels between its timesteps is refused at once."""
    pipe = with_scheduler(tiny_sd, ddim())

    def brightness(images: Tensor, prompts: list[str]) -> Tensor:
        return images.float().mean(dim=(1, 2, 3)) / 255

    settings: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 3, "max_nfe": 40}
    for policy in ("svdd", "threshold"):
        chosen = ValueSampling(chains=1, candidates=3) if policy == "svdd" else Threshold(0.4)
        report = NoiseSearchPipeline(pipe, brightness, chosen)("a cat", generator=seeded(0)[0], **settings).reports[0]
        assert report.finished and report.nfe <= 40
    with pytest.raises(ValueError, match="search-over-paths adds noise up to levels between timesteps"):
        NoiseSearchPipeline(pipe, brightness, "search-over-paths")("a cat", **settings)
    for sampler, word in (("rollover", "signal-to-noise"), ("euler-maruyama", "no derivatives")):
        with pytest.raises(ValueError, match=word):
            NoiseSearchPipeline(pipe, brightness, Threshold(0.4))("a cat", sampler=sampler, **settings)
