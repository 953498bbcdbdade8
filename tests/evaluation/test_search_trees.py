"""The picture of a search, from reports of real searches."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_search import run_policy, sum_of

from fastgen.evaluation.search_trees import _FORCED, _PATH, _TAU, _forced, _places, search_tree
from fastgen.pipelines.search.policies import Rollover, Threshold, ValueSampling
from fastgen.pipelines.search.policy import Policy
from fastgen.pipelines.search.populations import MonteCarlo, SearchOverPaths
from fastgen.pipelines.search.report import report_of
from fastgen.pipelines.search.starts import BestOfN
from fastgen.pipelines.search.thresholds import OnlineQuantile

pytest.importorskip("matplotlib")


def searched(policy: Policy, **options: Any) -> dict[str, Any]:
    """A report as a sidecar holds it."""
    ends, chains, _ = run_policy(policy, **options)
    owner = max(range(len(ends)), key=lambda place: ends[place].score)
    report = report_of("a $ring$ " * 20, policy, chains, ends[owner], chains[owner].number, "finished", 1.0)
    return dict(json.loads(json.dumps(report.as_dict())))


def count(image: Image.Image, color: str) -> int:
    """Pixels of a colour."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(np.asarray(image).astype(int) - wanted).max(axis=2) < 12).sum())


@pytest.mark.parametrize(
    ("policy", "options", "forced", "threshold"),
    [
        (Threshold(-9.0, starts=3), {"max_nfe": 12}, False, True),
        (Threshold(9.0, starts=3, chains=2), {"max_nfe": 30}, True, True),
        pytest.param(Threshold(OnlineQuantile(0.0), starts=3), {"max_nfe": 30}, None, False, marks=pytest.mark.slow),
        pytest.param(Rollover(chains=2, starts=3), {"max_nfe": 40}, True, False, marks=pytest.mark.slow),
        (ValueSampling(chains=2, candidates=3), {}, True, False),
        (BestOfN(n=5), {}, False, False),
        pytest.param(MonteCarlo(particles=6), {}, False, False, marks=pytest.mark.slow),
        pytest.param(SearchOverPaths(steps=3), {}, False, False, marks=pytest.mark.slow),
        (BestOfN(n=1), {"times": (1.0,)}, False, False),
    ],
)
def test_it_shows_the_way_the_threshold_and_what_was_forced(
    policy: Policy, options: dict[str, Any], forced: bool | None, threshold: bool
) -> None:
    search = searched(policy, **options)
    image = search_tree(search)
    assert image.mode == "RGB" and image.width > 800
    assert count(image, _PATH) > 50
    assert forced is None or (count(image, _FORCED) > 20) == forced
    assert (count(image, _TAU) > 20) == threshold
    for number, accepted in enumerate(search["accepted"]):
        nodes = _forced(search, number)
        assert len(nodes) == accepted.count(False)
        if number == search["chain"]:
            assert set(nodes) <= set(search["path"])


def test_places_are_times_and_scores() -> None:
    search = searched(ValueSampling(chains=1, candidates=4))
    places = _places(search["trees"][0])
    assert all(places[number] == (time, score) for number, _, time, score in search["trees"][0])
    # Search over paths comes back to its first time; there a node is still drawn to the right of its parent.
    tree = searched(SearchOverPaths(steps=3))["trees"][0]
    places = _places(tree)
    assert all(places[number][0] == places[parent][0] + 1 for number, parent, _, _ in tree if parent >= 0)
    assert max(x for x, _ in places.values()) > max(row[2] for row in tree)


def test_what_nothing_scored_stands_where_it_led() -> None:
    tree = [[0, -1, 0, None], [1, -1, 0, None], [2, 0, 1, 0.25], [3, 0, 1, 0.75], [4, 1, 1, None]]
    assert _places(tree) == {0: (0, 0.75), 1: (0, 0.25), 2: (1, 0.25), 3: (1, 0.75), 4: (1, 0.25)}
    search = searched(BestOfN(n=3), verifier=lambda pictures, prompts: torch.full((len(pictures),), math.nan))
    assert search["score"] is None and count(search_tree(search), _PATH) > 50


def test_the_picture_is_shown_next_to_it() -> None:
    search = searched(Threshold(0.0), max_nfe=20, verifier=sum_of)
    blue = Image.new("RGB", (16, 16), (10, 20, 250))
    assert count(search_tree(search, blue), "#0a14fa") > 5000 > count(search_tree(search), "#0a14fa")
