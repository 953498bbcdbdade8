"""Calibration of CASCADE-R: thresholds that keep their limit, files, and the quality knob."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_speculation import Toy

from fastgen.drafters.calibration import Calibration, Level, PairRecorder, calibrate_levels
from fastgen.drafters.cascade import CascadeConfig
from fastgen.drafters.tree import named_tree
from fastgen.drafters.verify import strict
from fastgen.errors import FastgenError


def kept(pairs: torch.Tensor, level: Level) -> list[torch.Tensor]:
    """Variation of the pairs that each threshold relates."""
    alike, met, apart, variation, _ = pairs.unbind(dim=1)
    near = (apart <= level.radius) & (level.radius > 0)  # a radius of 0 relates nothing
    return [variation[alike >= level.breadth], variation[met >= level.depth], variation[near]]


@given(seed=st.integers(0, 10_000), slope=st.floats(0.2, 2.0), coarse=st.booleans())
@settings(max_examples=40, deadline=None)
def test_nine_of_ten_related_pairs_keep_the_limit(seed: int, slope: float, coarse: bool) -> None:
    """And no smaller threshold does."""
    generator = torch.Generator().manual_seed(seed)
    alike = torch.rand(400, generator=generator) * 2 - 1
    if coarse:
        alike = (alike * 5).round() / 5
    variation = ((1 - alike) / 2 * slope + 0.05 * torch.rand(400, generator=generator)).clamp(0, 1)
    moved = torch.rand(400, generator=generator)
    moved[::7], moved[::11] = torch.inf, 0.0  # nodes without a pair, and pairs of one state
    pairs = torch.stack([alike, alike, 1 - alike, variation, moved], dim=1)
    known = sorted(value for value in moved.tolist() if 0 < value < 2)
    assert calibrate_levels(pairs).sensitivity == pytest.approx(known[(len(known) - 1) // 2])
    for level in calibrate_levels(pairs).levels:
        for related, count in zip(kept(pairs, level), level.pairs, strict=True):
            assert len(related) == count
            assert count == 0 or float((related <= level.limit).double().mean()) >= 0.9
        smaller = [value for value in alike.unique().tolist() if value < level.breadth]
        for value in smaller:
            inside = variation[alike >= value]
            assert float((inside <= level.limit).double().mean()) < 0.9 or len(inside) < 50
    breadths = [level.breadth for level in calibrate_levels(pairs).levels]
    assert breadths == sorted(breadths, reverse=True), "a larger limit relates more"


def test_no_similar_pairs_means_off() -> None:
    pairs = torch.cat([torch.rand(100, 3), torch.ones(100, 1), torch.full((100, 1), torch.inf)], dim=1)
    made = calibrate_levels(pairs)
    level = made.levels[-1]
    assert made.sensitivity is None and made.config(1.0).sensitivity == float("inf")
    assert (level.breadth, level.depth, level.radius, level.pairs) == (2.0, 2.0, 0.0, (0, 0, 0))
    with pytest.raises(ValueError, match="too few"):
        calibrate_levels(pairs[:10])


def test_quality_picks_a_level() -> None:
    levels = tuple(Level(q, q / 5, 1 - q / 2, 1 - q / 4, q, (9, 9, 9)) for q in (0.25, 0.5, 1.0))
    calibration = Calibration(levels)
    assert calibration.config(0.0) == CascadeConfig.off() == calibration.config(0.2)
    assert calibration.config(0.6).breadth == 0.75 and calibration.config(1.0).radius == 1.0
    assert calibration.config(0.5, delta=0.1).delta == 0.1
    assert replace(calibration, sensitivity=2.0).config(0.5).sensitivity == 2.0
    for bad in (-0.1, 1.1, float("nan"), True):
        with pytest.raises(ValueError, match="quality"):
            calibration.config(bad)


def test_a_saved_calibration_is_the_same(tmp_path: Path) -> None:
    calibration = Calibration((Level(0.5, 0.1, 0.9, 0.95, 0.2, (3, 2, 1)), Level(1.0, 0.3, 0.5, 0.6, 0.4, (6, 5, 4))))
    for sensitivity in (None, 1.5):
        made = Calibration(calibration.levels, {"target": "toy"}, sensitivity=sensitivity)
        made.save(tmp_path / "x")
        again = Calibration.load(tmp_path / "x")
        assert again == made and again.about == {"target": "toy"}
    assert Calibration.of_dict({"levels": calibration.as_dict()["levels"]}) == calibration, "of an earlier version"
    with pytest.raises(ValueError, match="sensitivity"):
        Calibration.of_dict({**calibration.as_dict(), "sensitivity": -1.0})
    with pytest.raises(ValueError, match="cascade-calibrate"):
        Calibration.load(tmp_path)
    (tmp_path / "calibration.json").write_text('{"levels": [{"quality": 1}]}')
    with pytest.raises(ValueError, match="cannot be read"):
        Calibration.load(tmp_path)


def test_the_recorder_decides_exactly_and_sees_every_pair() -> None:
    """Twins have similarity 1 and no variation; the codebook puts them 0.01 apart."""
    toy, tree = Toy.twins(3, seed=4), named_tree("4-3")
    generator = torch.Generator().manual_seed(0)
    drafted = toy.draft(tree, torch.tensor([[0, 1]]).expand(200, 2), True, generator)
    noise = toy.noise(200, tree, generator)
    spots = torch.arange(6.0)
    book = torch.stack([spots.div(2, rounding_mode="floor") + 0.01 * (spots % 2), torch.zeros(6)], dim=1)
    recorder = PairRecorder(2, book)
    assert torch.equal(recorder.verify(drafted, noise, torch.zeros(200)).child, strict(drafted, noise).child)
    pairs = recorder.pairs
    count = sum(k * (k - 1) // 2 for k in (drafted.inner_children() >= 0)[0].sum(dim=1).tolist())
    assert pairs.shape == (200 * count, 5)
    twins = pairs[:, 0] > 0.999
    assert twins.any() and not twins.all()
    assert float(pairs[twins, 3].max()) < 1e-6 < float(pairs[~twins, 3].min())
    finite = torch.isfinite(pairs[:, 2])
    assert torch.equal(finite, torch.isfinite(pairs[:, 4]))
    assert float(pairs[twins & finite, 2].max()) < float(pairs[~twins & finite, 2].min())


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "target_layers"])
def test_a_calibration_of_another_model_is_refused(name: str) -> None:
    """With one line, and so is a benchmark of another model; one that does not say what it was made for is taken."""
    sizes = {"hidden_size": 32, "vocab_size": 48, "target_layers": 2}
    made = Calibration((), {"target": {**sizes, name: 7}})
    for refused in (lambda: made.check(sizes), lambda: made.with_results(result(sizes))):
        with pytest.raises(FastgenError, match=f"made for a model of {name} 7, this one has {sizes[name]}") as caught:
            refused()
        assert "\n" not in str(caught.value)
    made.check({"num_tokens": 16})
    for about in ({}, {"target": {}}, {"target": "toy"}):
        Calibration((), about).check(sizes)


def result(target: dict[str, int]) -> dict[str, Any]:
    """Of `fastgen bench speculative`."""
    row = {"variant": "plain loop", "rule": None, "target_pass_ratio": 1.0, "seconds": {"p50": 1.0}}
    drawn = {**row, "variant": "exact jacobi-4", "rule": "exact", "target_pass_ratio": 0.5}
    return {"rows": [row, drawn], "settings": {"device": "cpu", "compile": False, "target": target}}
