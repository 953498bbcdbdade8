"""Measured thresholds: how they are stored, for whom they are, and how a search takes them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from tiny_pipelines import loaded

from fastgen.pipelines.loading import load_pipeline
from fastgen.pipelines.noise_search import NoiseSearchPipeline
from fastgen.pipelines.search.calibration import (
    Calibration,
    Schedule,
    calibration_for,
    model_signature,
    read_calibrations,
)
from fastgen.pipelines.search.names import named_policy
from fastgen.pipelines.search.prospects import Prospects
from fastgen.pipelines.search.thresholds import Fixed, check_in_range

SETTINGS: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 2.0}


class Brightness:
    """A verifier that declares what it can say, and may bring thresholds."""

    name, range = "brightness", (0.0, 1.0)

    def __init__(self, *thresholds: Calibration) -> None:
        self.thresholds = thresholds

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.float().mean(dim=(1, 2, 3)) / 255


@pytest.fixture(scope="module")
def pipe(micro_z: Path) -> Any:
    return loaded(ZImagePipeline, micro_z)


@pytest.fixture(scope="module")
def measured(pipe: Any) -> Calibration:
    schedules = tuple(
        Schedule(price, taus, evaluations)
        for price, taus, evaluations in (
            (0.1, (0.1, 0.2, 0.3), 3.0),
            (0.05, (0.1, 0.3, 0.5), 6.0),
            (0.01, (0.2, 0.4, 0.6), 12.0),
        )
    )
    return Calibration(
        "micro",
        model_signature(pipe),
        "brightness",
        (1.0, 0.5, 0.25),
        schedules,
        4,
        "correct",
        0.7,
        {"0.5": (0.1, 0.2, 0.3)},
        {"curve": []},
        {"seed": 0},
    )


def test_a_calibration_is_what_was_saved(measured: Calibration, tmp_path: Path) -> None:
    measured.save(tmp_path / "thresholds.json")
    for place in (tmp_path, tmp_path / "thresholds.json"):
        found = Calibration.load(place)
        assert found == measured and found.report == measured.report and found.about == measured.about
    assert read_calibrations(tmp_path) == (measured,) and read_calibrations(tmp_path / "absent") == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedules": []}, "schedules: needs at least one"),
        ({"times": [0.5, 0.5, 0.2]}, "numbers that fall"),
        ({"quantiles": {"0.5": [1.0]}}, "need 3 finite numbers"),
        ({"colour": 1}, "colour"),
        ({"schedules": [{"price": 1.0}]}, "taus"),
    ],
)
def test_a_broken_file_is_an_error_in_one_line(
    change: dict[str, Any], message: str, measured: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "thresholds.json"
    measured.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        Calibration.load(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="not valid JSON"):
        Calibration.load(tmp_path)
    with pytest.raises(ValueError, match="cannot read"):
        Calibration.load(tmp_path / "absent.json")


def test_the_budget_chooses_the_schedule(measured: Calibration) -> None:
    prices = [measured.schedule(evaluations).price for evaluations in (1, 3, 5.9, 6, 11, 12, 400)]
    assert prices == [0.1, 0.1, 0.1, 0.05, 0.05, 0.01, 0.01]
    assert measured.schedule().price == 0.05


def test_thresholds_follow_the_noise_level(measured: Calibration) -> None:
    """Another number of steps, and a grid that ends elsewhere."""
    found = measured.threshold([1.2, 1.0, 0.75, 0.5, 0.375, 0.25, 0.1], 3)
    assert found.taus == pytest.approx([0.1, 0.1, 0.15, 0.2, 0.25, 0.3, 0.3]) and found.times == 7
    assert [found.at(index, [], 0, 0) for index in (0, 3, 6)] == pytest.approx([0.1, 0.2, 0.3])
    assert found.name.endswith("; micro, price 0.1)")


def test_a_model_is_recognised_by_its_configuration(pipe: Any, micro_dc: Path, measured: Calibration) -> None:
    assert measured.fits(pipe) and not measured.fits(load_pipeline(str(micro_dc)))
    signature = dict(measured.signature)
    known = signature["config"]
    assert not replace(measured, signature={**signature, "config": {**known, "n_layers": 3}}).fits(pipe)
    # A library that gained a setting, or lost one, tells no model from another.
    assert replace(measured, signature={**signature, "config": {**known, "brand_new": 1}}).fits(pipe)
    fewer = {key: value for key, value in known.items() if key != "qk_norm"}
    assert replace(measured, signature={**signature, "config": fewer}).fits(pipe)


def test_a_search_without_a_tau_takes_what_was_measured(pipe: Any, measured: Calibration, tmp_path: Path) -> None:
    def policy(verifier: Any, thresholds: Any = None, **extra: Any) -> str:
        search = NoiseSearchPipeline(pipe, verifier, "threshold", thresholds=thresholds)
        output = search("a circle", generator=torch.Generator().manual_seed(0), **SETTINGS, **extra)
        return str(output.reports[0].policy)

    measured.save(tmp_path / "thresholds.json")
    found = policy(Brightness(measured), max_nfe=24)
    assert found.startswith("threshold, tau schedule(0.2, ") and found.endswith("; micro, price 0.01)")
    assert policy(Brightness(), tmp_path / "thresholds.json", max_nfe=24) == found
    assert policy(Brightness(), measured, max_nfe=12).endswith("price 0.05)")
    assert policy(Brightness(measured), max_seconds=0.3).endswith("price 0.05)")
    assert policy(Brightness(), max_nfe=24) == "threshold, tau online-quantile(0.8)"
    other = replace(measured, signature={**measured.signature, "pipeline": "FluxPipeline"})
    assert policy(Brightness(other), max_nfe=24) == "threshold, tau online-quantile(0.8)"
    # The policy object is as it was: the next call may have another budget.
    search = NoiseSearchPipeline(pipe, Brightness(measured), "threshold")
    assert [search("a circle", max_nfe=n, **SETTINGS).reports[0].policy[-9:] for n in (12, 24)] == [
        "ice 0.05)",
        "ice 0.01)",
    ]


def test_with_measured_prospects_a_search_begins_another_trajectory(
    pipe: Any, measured: Calibration, tmp_path: Path
) -> None:
    rows = ((0.0, 1.0),) * 3
    judged = replace(measured, prospects=Prospects(0.6, rows, rows))
    judged.save(tmp_path / "thresholds.json")
    assert Calibration.load(tmp_path) == judged
    assert judged.goal == pytest.approx(0.9) and measured.goal is None
    search = NoiseSearchPipeline(pipe, Brightness(judged), named_policy("threshold", goal=0.99))
    report = search("a circle", max_nfe=60, generator=torch.Generator().manual_seed(0), **SETTINGS).reports[0]
    assert report.policy == "threshold, tau fixed(-inf), given up by measured chances, anew until 0.99"
    assert report.starts > 1 and 52 < report.nfe <= 60 and set(report.tries[0]) == {1}
    search = NoiseSearchPipeline(pipe, Brightness(judged), "threshold")
    report = search("a circle", max_nfe=16, generator=torch.Generator().manual_seed(0), **SETTINGS).reports[0]
    assert report.policy.endswith("anew until 0.9")
    search = NoiseSearchPipeline(pipe, Brightness(judged), named_policy("threshold", restarts=False))
    assert search("a circle", max_nfe=24, **SETTINGS).reports[0].policy.endswith("price 0.01)")
    with pytest.raises(ValueError, match="goal: .* outside the scores of brightness"):
        NoiseSearchPipeline(pipe, Brightness(), named_policy("threshold", tau=0.5, restarts=True, goal=3.0))
    with pytest.raises(ValueError, match="goal: .* is not allowed"):
        named_policy("threshold", goal=math.nan)
    with pytest.raises(ValueError, match="prospects: need 3 rows"):
        replace(measured, prospects=Prospects(0.6, rows[:2], rows[:2]))


def test_chains_share_the_budget(pipe: Any, measured: Calibration) -> None:
    search = NoiseSearchPipeline(pipe, Brightness(measured), named_policy("threshold", chains=2))
    assert search("a circle", max_nfe=24, **SETTINGS).reports[0].policy.endswith("price 0.05)")


def test_thresholds_hold_in_a_search(pipe: Any, measured: Calibration) -> None:
    """Every transition that was accepted scored above the threshold of its time."""
    search = NoiseSearchPipeline(pipe, Brightness(), named_policy("threshold", patience=3), thresholds=measured)
    report = search("a circle", max_nfe=60, generator=torch.Generator().manual_seed(3), **SETTINGS).reports[0]
    taus = [float(word) for word in report.policy.split("schedule(")[1].split(";")[0].split(",")]
    scores = {row[0]: row[3] for row in report.trees[0]}
    assert len(taus) == 4
    for number, (index, accepted) in zip(report.path[1:], enumerate(report.accepted[0], 1), strict=True):
        assert accepted == (scores[number] > taus[index] + 5e-4) or abs(scores[number] - taus[index]) < 1e-3


def test_what_does_not_fit_is_refused_before_anything_is_drawn(pipe: Any, measured: Calibration) -> None:
    for tau in (1.5, -0.1, Fixed(7.0)):
        with pytest.raises(ValueError, match=r"tau: .* outside the scores of brightness, which are 0 to 1"):
            NoiseSearchPipeline(pipe, Brightness(), named_policy("threshold", tau=tau))
    for tau in (math.inf, -math.inf, 0.0, 1.0):  # all or nothing is meant
        NoiseSearchPipeline(pipe, Brightness(), named_policy("threshold", tau=tau))
    NoiseSearchPipeline(pipe, Brightness().score, named_policy("threshold", tau=7.0))  # says nothing of its range
    with pytest.raises(ValueError, match=r"thresholds: policy threshold, tau fixed\(0.5\) takes none"):
        NoiseSearchPipeline(pipe, Brightness(), named_policy("threshold", tau=0.5), thresholds=measured)
    with pytest.raises(ValueError, match="thresholds: policy best-of-n"):
        NoiseSearchPipeline(pipe, Brightness(), "best-of-n", thresholds=measured)
    with pytest.raises(ValueError, match="measured with verifier other, not with brightness"):
        calibration_for(pipe, Brightness(), replace(measured, verifier="other"))
    with pytest.raises(ValueError, match="measured for micro, a model of another configuration"):
        calibration_for(pipe, Brightness(), replace(measured, signature={**measured.signature, "class": "UNet"}))
    for tau in ("auto", math.nan, True):
        with pytest.raises(ValueError, match="tau: .* is not allowed"):
            named_policy("threshold", tau=tau)
    with pytest.raises(ValueError, match="nan is no number"):
        check_in_range("tau", math.nan, None)
