"""`fastgen bench search`: rows, resumption, scaling to budgets, statistics."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.cli.main import run
from fastgen.data.captions import vocabulary
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks import search as bench
from fastgen.evaluation.benchmarks.search import benchmark_search
from fastgen.evaluation.benchmarks.search_rows import Row, statistics_of
from fastgen.evaluation.benchmarks.search_statistics import (
    Outcomes,
    Resampling,
    compare,
    diversity,
    mixture,
    reach,
    reach_cost,
)
from fastgen.evaluation.benchmarks.search_variants import VARIANTS, parse_variant, scaled
from fastgen.models.shapes_verifier import ShapesVerifier
from fastgen.pipelines.search.thresholds import BestSoFar, OnlineQuantile, PreviousPlus

# The micro model takes two evaluations of two forward passes a picture.
POLICIES = ["threshold tau=0.6", "svdd", "best-of-n"]
BUDGETS = [4, 16]


@pytest.fixture(scope="module")
def verifiers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    names = []
    for seed in range(2):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("verifier")
        ShapesVerifier(vocabulary(), width=32, channels=16, depth=1, fusion_layers=2).save_pretrained(folder)
        names.append(f"shapes-verifier:{folder}")
    return names[0], names[1]


def command(model: Path, verifiers: tuple[str, str], folder: Path) -> list[str]:
    words = ["bench", "search", "--model", str(model), "--verifier", verifiers[0], "--heldout", verifiers[1]]
    words += ["--folder", str(folder), "--limit", "1", "--seeds", "2"]
    words += [word for name in POLICIES for word in ("--policy", name)]
    return words + [word for budget in BUDGETS for word in ("--budget", str(budget))]


def test_rows_and_statistics(
    micro_z: Path, verifiers: tuple[str, str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every policy that is possible has its row, and the rows agree with what is known of them."""
    words = command(micro_z, verifiers, tmp_path / "f")
    out = tmp_path / "r.json"
    assert run([*words, "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text()) and set(printed["settings"]) >= {"threads", "sampler", "times"}
    rows = {(row["policy"], row["budget"]): row for row in printed["rows"]}
    searched = [("threshold tau=0.6", 4), *itertools.product(POLICIES, [16])]
    assert sorted(rows, key=str) == sorted([("none", None), *searched], key=str)
    # Four forward passes are one picture: nothing to choose from.
    assert {(entry["policy"], entry["budget"]) for entry in printed["skipped"]} == {(n, 4) for n in POLICIES[1:]}
    base = rows["none", None]
    assert base["nfe"] == 4 and base["verifier_calls"] == 0 and base["gain"] == 0 and base["gain_ci"] == [0, 0]
    for (name, budget), row in rows.items():
        low, high = row["score_ci"]
        assert row["n"] == 12 and 0 <= row["score"] <= 1 and low - 1e-9 <= row["score"] <= high + 1e-9
        assert row["score"] == pytest.approx(np.mean(list(row["tasks"].values())))
        assert row["gain"] == pytest.approx(row["score"] - base["score"])
        assert 0 < row["seconds_ci"][0] < row["seconds"] < row["seconds_ci"][1]
        assert sum(row["phases"].values()) <= row["seconds"] and row["finished"] == 1
        assert row["evaluations"] * 2 == row["nfe"] and sum(row["evaluations_by_time"]) == row["evaluations"]
        assert 0 < row["searched"] < 1 and 0 < row["heldout"] < 1 and row["searched"] != row["heldout"]
        assert row["diversity"] > 0
        if budget is not None:
            assert row["nfe"] <= budget and row["verifier_calls"] > 0 and row["description"].startswith(row["method"])
        if name != "none" and row["method"] != "threshold":
            assert row["nfe"] == budget
            assert row["searched"] >= base["searched"]  # it picked by that verifier
    assert len(printed["comparisons"]) == 2 * 2 and len(printed["reach"]) == 2 * 2
    for entry in printed["comparisons"]:
        assert 0 < entry["p"] <= 1 and entry["slower"] == (entry["rival_seconds"] >= entry["seconds"])
    # All is there: nothing is drawn again, and its table and plot can be made.
    monkeypatch.setattr(bench, "_search", None)
    pytest.importorskip("matplotlib")
    assert run([*words, "--plot", str(tmp_path / "p.png")]) == 0
    text = capsys.readouterr().out
    assert "| svdd | 16 | 16 |" in text and "above best-of-n" in text and "Left out: svdd at 4" in text
    assert (tmp_path / "p.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_policy_may_have_a_budget_of_its_own(micro_z: Path, verifiers: tuple[str, str], tmp_path: Path) -> None:
    names = ["best-of-n", "svdd max_nfe=24"]
    found = benchmark_search(
        str(micro_z), tmp_path, verifier=verifiers[0], policies=names, budgets=[8, 16], limit=1, seeds=1
    )
    assert [(row["policy"], row["budget"]) for row in found["rows"][1:]] == [
        (names[0], 8),
        (names[0], 16),
        (names[1], 24),
    ]
    for bad in ("svdd max_nfe=0", "svdd max_nfe=much"):
        with pytest.raises(ValueError, match="max_nfe"):
            parse_variant(bad)


@pytest.mark.slow
def test_an_interrupted_run_continues(
    micro_z: Path, verifiers: tuple[str, str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a search loses that search only; the pictures are those of an uninterrupted run, and more prompts and
    policies can be added to the folder."""
    from fastgen.evaluation.verifiers.shapes_verifier import ShapesVerifier as Wrapped

    arguments: dict[str, Any] = {"verifier": verifiers[0], "budgets": [16], "limit": 1, "seeds": 1}
    benchmark_search(str(micro_z), tmp_path / "whole", policies=["svdd"], **arguments)
    words = ["bench", "search", "--model", str(micro_z), "--verifier", verifiers[0], "--budget", "16", "--limit", "1"]
    words += ["--seeds", "1", "--policy", "svdd", "--folder", str(tmp_path / "cut"), "--json"]
    real, calls = Wrapped._score_batch, []

    def tired(self: Any, images: Any, sides: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(self, images, sides)

    with monkeypatch.context() as patched:
        patched.setattr(Wrapped, "_score_batch", tired)
        assert run(words) == 130
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*-*.png")}
    records = {path.with_suffix(".png") for path in (tmp_path / "cut").rglob("*-*.json")}
    assert kept and set(kept) == records and len(kept) < 12
    assert run(words) == 0
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    for path in (tmp_path / "whole").rglob("*-*.png"):
        assert (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
    more = benchmark_search(
        str(micro_z), tmp_path / "cut", policies=["svdd", "smc"], **{**arguments, "limit": 2, "seeds": 2}
    )
    assert [row["n"] for row in more["rows"]] == [24] * 3
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    # Searches under other settings do not mix with these.
    with pytest.raises(FastgenError, match="batch_size is 32 there and 1 now"):
        benchmark_search(str(micro_z), tmp_path / "cut", policies=["svdd"], batch_size=1, **arguments)
    with pytest.raises(FastgenError, match="verifier is"):
        benchmark_search(str(micro_z), tmp_path / "cut", policies=["svdd"], **{**arguments, "verifier": verifiers[1]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--policy", "luck"], "policy: 'luck'"),
        (["--policy", "svdd tau=1"], "no setting 'tau'"),
        (["--policy", "svdd chains"], "POLICY [SETTING=VALUE …]"),
        (["--policy", "svdd chains=0"], "chains: 0"),
        (["--policy", "threshold tau=7"], "tau: 7"),
        (["--policy", "svdd sampler=magic"], "magic"),
        (["--policy", "none seed=1"], "no setting 'seed'"),
        (["--budget", "0"], "budgets"),
        (["--seeds", "0"], "seeds"),
        (["--limit", "0"], "limit"),
        (["--model", "tiny-janus"], "no diffusion pipeline"),
        (["--verifier", "taste"], "taste"),
        (["--heldout", "taste"], "taste"),
    ],
)
def test_bad_arguments(
    change: list[str], message: str, micro_z: Path, verifiers: tuple[str, str], tmp_path: Path, capsys: Any
) -> None:
    values = {"--model": str(micro_z), "--verifier": verifiers[0], "--budget": "16", "--folder": str(tmp_path / "f")}
    values |= {"--limit": "1", "--seeds": "1", "--policy": "svdd", change[0]: change[1]}
    assert run(["bench", "search", *(word for pair in values.items() for word in pair)]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.rglob("*.png"))


def test_a_folder_of_other_things_is_left_alone(micro_z: Path, verifiers: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FastgenError, match="has no searches"):
        benchmark_search(str(micro_z), tmp_path, verifier=verifiers[0], policies=["svdd"], budgets=[16], limit=1)


# ---- variants ----


def test_variants_read_settings_thresholds_and_arguments() -> None:
    variant = parse_variant("threshold tau=0.7 starts=4 returns=best sampler=rollover target_score=0.9")
    assert variant.settings == {"tau": 0.7, "starts": 4, "returns": "best"}
    assert variant.arguments == {"sampler": "rollover", "target_score": 0.9}
    assert parse_variant("threshold thresholds=1.json").thresholds == "1.json"
    assert parse_variant("svdd preview=pooled").arguments == {"preview": "pooled"}
    for text, rule in (
        ("best-so-far", BestSoFar()),
        ("online-quantile(0.5)", OnlineQuantile(0.5)),
        ("previous(-0.1)", PreviousPlus(-0.1)),
    ):
        assert parse_variant(f"threshold tau={text}").settings == {"tau": rule}


def test_searches_of_the_paper() -> None:
    """500 forward passes without guidance and ten steps: what the methods were published with."""
    found = {name: vars(scaled(parse_variant(name), 500, 1, 10)) for name in VARIANTS}
    assert found["rbf"] | {"chains": 2, "starts": 25} == found["rbf"]
    for name in ("svdd", "code"):
        assert found[name] | {"chains": 2, "candidates": 25} == found[name]
    assert found["smc"]["particles"] == 50 and found["best-of-n"]["n"] == 50
    assert scaled(parse_variant("svdd chains=1"), 500, 1, 10).candidates == 50  # type: ignore[attr-defined]
    assert scaled(parse_variant("svdd candidates=3"), 500, 1, 10).candidates == 3  # type: ignore[attr-defined]


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(VARIANTS),
    evaluations=st.integers(1, 400),
    forwards=st.integers(1, 2),
    times=st.integers(2, 14),
    odd=st.booleans(),
)
def test_policies_spend_their_budget(name: str, evaluations: int, forwards: int, times: int, odd: bool) -> None:
    """Never more than it; and what a policy is sure to spend is most of it, once a few candidates are affordable."""
    budget = evaluations * forwards + (odd and forwards == 2)
    try:
        policy = scaled(parse_variant(name), budget, forwards, times)
    except ValueError as error:
        small = 90 if name == "search-over-paths" else 2 * times + 2
        assert evaluations < small and str(error)
        return
    least = policy.least(times - 1)
    assert least <= evaluations
    whole = {"smc": times, "svdd": 2 * times, "code": 2 * times, "search-over-paths": 40}
    if name in whole:
        assert evaluations - least < whole[name]
    if name == "best-of-n":
        assert evaluations - policy.n * times < times  # type: ignore[attr-defined]
    if name == "rbf":
        assert policy.starts * policy.chains <= max(2, evaluations / 10 + 1)  # type: ignore[attr-defined]


# ---- statistics ----

TAGS = ["a"] * 6 + ["b"] * 3


def outcomes(correct: Any, seconds: float = 1.0) -> Outcomes:
    values = np.asarray(correct, dtype=float)
    return Outcomes(values, np.full(len(values), seconds), np.full(len(values), 10 * seconds))


def test_means_weight_every_task_equally() -> None:
    by = Resampling(TAGS, draws=3000)
    values = np.array([1.0] * 6 + [0.0] * 3)
    assert by.mean(values) == pytest.approx(0.5)
    # Tasks are not mixed by the bootstrap: without variance inside them the result has none.
    assert by.interval(values) == pytest.approx([0.5, 0.5])
    mixed = np.array([1.0, 0, 1, 0, 1, 0, 1, 0, 1])
    expected = np.sqrt(mixed[:6].var(ddof=1) / 6 + mixed[6:].var(ddof=1) / 3) / 2
    assert by.means(mixed).std() == pytest.approx(expected, rel=0.05)
    # One prompt a task says nothing of prompts of a task: not a certain score, but a wide interval.
    low, high = Resampling(list("abcdef")).interval(np.array([1.0, 0, 1, 1, 1, 1]))
    assert low < 0.7 and high == 1


def test_paired_test_is_the_exact_one() -> None:
    """Of nine prompts: all sign patterns by hand, with the weights of the tasks."""
    by = Resampling(TAGS, draws=200)
    difference = np.array([0.5, 0.2, -0.1, 0.4, 0.0, 0.3, 0.6, -0.2, 0.1])
    found = compare(outcomes(0.2 + difference), outcomes(np.full(9, 0.2)), by)
    signs = np.array(list(itertools.product((-1, 1), repeat=9)))
    sums = signs @ (difference * by.weights)
    assert found["p"] == pytest.approx((sums >= difference @ by.weights - 1e-12).mean())
    assert found["difference"] == pytest.approx(difference @ by.weights)
    assert found["ci"][0] < found["difference"] < found["ci"][1]
    same = compare(outcomes(difference), outcomes(difference), by)
    assert same["p"] == 1 and same["difference"] == 0


def test_cost_of_a_score() -> None:
    assert reach_cost([1, 2, 4], [0.2, 0.4, 0.8], 0.7) == pytest.approx(3.5)
    assert reach_cost([4, 1, 2], [0.8, 0.2, 0.4], 0.6) == pytest.approx(3)
    assert reach_cost([1, 2], [0.5, 0.6], 0.4) == 1  # at most what the smallest budget takes
    assert reach_cost([1, 2], [0.5, 0.6], 0.7) == float("inf")
    assert reach_cost([1, 2, 3], [0.2, 0.7, 0.1], 0.45) == pytest.approx(1.5)


def test_equal_seconds_are_a_mixture_of_the_two_nearest_budgets() -> None:
    """A rival as good as its seconds say; rows with a budget of their own are budgets of one rival."""
    rng, tags = np.random.default_rng(0), [tag for tag in "abcdef" for _ in range(10)]
    by = Resampling(tags, draws=200)

    def row(policy: str, budget: int, seconds: float, chance: float) -> Row:
        outcomes = Outcomes(rng.binomial(20, chance, 60) / 20, np.full(60, seconds), np.full(60, float(budget)))
        data = {"policy": policy, "budget": budget, "seconds": seconds, "score": by.mean(outcomes.correct)}
        return Row(policy.split()[0], outcomes, data | {"settings": {}})

    rows = [
        row("none", 0, 0.5, 0.3),
        row("threshold", 100, 1.5, 0.9),
        row("threshold max_nfe=40", 40, 0.9, 0.9),  # no rival is as fast
        row("best-of-n", 48, 1.0, 0.5),
        row("best-of-n max_nfe=72", 72, 2.0, 0.9),
        row("best-of-n max_nfe=200", 200, 4.0, 0.9),
        row("svdd", 48, 1.6, 0.9),  # nor slower and faster at once
    ]
    summary = statistics_of(rows, by)
    (found,) = summary["equal"]
    assert (found["policy"], found["rival"], found["rival_budgets"]) == ("threshold", "best-of-n", [48, 72])
    assert found["share"] == pytest.approx(0.5)
    half = (rows[3].data["score"] + rows[4].data["score"]) / 2
    assert found["rival_score"] == pytest.approx(half) and 0.6 < half < 0.8
    assert found["difference"] == pytest.approx(rows[1].data["score"] - half) and found["p"] < 0.001
    reached = {entry["rival"]: entry for entry in summary["reach"] if entry["unit"] == "seconds"}
    assert {entry["policy"] for entry in summary["reach"]} == {"threshold"} and set(reached) == {"best-of-n", "svdd"}
    assert reached["best-of-n"]["rival_budget"] == 200 and reached["svdd"]["rival_budget"] == 48
    mixed = mixture(rows[3].outcomes, rows[4].outcomes, 0.25)
    assert mixed.seconds.mean() == pytest.approx(1.75) and mixed.nfe.mean() == pytest.approx(66)


def test_reaching_a_rival() -> None:
    by = Resampling(TAGS, draws=500)
    curve = [outcomes([0.0] * 9, 1), outcomes([1.0] * 9, 3)]
    rival = outcomes([0.5] * 9, 8)
    for cost, factor in (("seconds", 1), ("nfe", 10)):
        found = reach(curve, rival, cost, by)
        assert found["cost"] == pytest.approx(2 * factor) and found["rival_cost"] == pytest.approx(8 * factor)
        assert found["ratio"] == pytest.approx(4) and found["ci"] == pytest.approx([4, 4]) and found["reached"] == 1
        assert not found["bound"] and reach(curve[1:], rival, cost, by)["bound"]
    never = reach(curve[:1], rival, "seconds", by)
    assert never["cost"] is None and never["ratio"] == 0 and never["ci"] == [0, 0] and never["reached"] == 0
    json.dumps(never, allow_nan=False)


def test_distance_of_pictures() -> None:
    by = Resampling(["a", "b"], draws=10)
    features = np.zeros((2, 3, 4))
    assert diversity(features, by) == 0
    features[0, 1] = (3, 4, 0, 0)  # of three pairs two are 5 apart
    assert diversity(features, by) == pytest.approx((10 / 3 + 0) / 2)
    assert diversity(features[:, :1], by) is None
