"""What `tree=None` takes, and what is kept of `tree="auto"`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgen.drafters.calibration import Calibration, Level
from fastgen.drafters.choices import fingerprint, load_choice, save_choice
from fastgen.drafters.pace import Pace, machine_of
from fastgen.drafters.tree import named_tree
from fastgen.errors import FastgenError

NAMES = ("jacobi-4", "heads-4", "4-2")
TOKENS = {"exact": {"jacobi-4": 3.0, "heads-4": 4.0, "4-2": 2.0}}
TIMES = st.dictionaries(st.sampled_from(NAMES), st.floats(0.1, 10.0))
TABLES = st.dictionaries(
    st.sampled_from(["cpu eager", "cpu compiled"]),
    st.dictionaries(st.integers(1, 9).map(str), st.dictionaries(st.sampled_from(["exact", "gsd"]), TIMES)),
)


@given(
    times=TABLES,
    rule=st.sampled_from(["exact", "gsd", "cascade"]),
    machine=st.sampled_from(["cpu eager", "cpu compiled", "cuda eager"]),
    batch=st.integers(1, 12),
    without=st.sampled_from([None, *NAMES]),
)
def test_only_what_was_measured_to_be_faster_replaces_the_plain_loop(
    times: Any, rule: str, machine: str, batch: int, without: str | None
) -> None:
    """For every rule, lossy ones too; of usable sources the fastest, in the next larger batch that was measured."""
    pace = Pace(TOKENS, times)
    name, reason = pace.fastest(rule, machine, batch, 4, lambda name: name != without)
    assert name != without and "\n" not in reason
    if machine not in times:
        assert name == "plain" or (rule == "exact" and batch == 1)
        return
    larger = [int(size) for size in times[machine] if int(size) >= batch]
    measured = times[machine][str(min(larger))].get(rule, {}) if larger else {}
    usable = {name: time for name, time in measured.items() if name != without}
    assert {**usable, "plain": 1.0}[name] == min({**usable, "plain": 1.0}.values())
    assert ("was not measured" in reason) == (not measured)


def test_a_device_without_measurements_is_counted_by_passes_and_levels() -> None:
    pace = Pace(TOKENS, {})
    assert pace.fastest("exact", "cuda compiled", 1, 24, lambda name: True)[0] == "heads-4"
    # With one layer, heads cost a pass more: 2 passes for 4 tokens are dearer than 1 for 3.
    assert pace.fastest("exact", "cuda eager", 1, 1, lambda name: True)[0] == "jacobi-4"
    assert pace.fastest("exact", "cuda eager", 1, 1, lambda name: name == "4-2")[0] == "plain"
    for rule, batch in (("gsd", 1), ("exact", 2)):
        name, reason = pace.fastest(rule, "cuda compiled", batch, 24, lambda name: True)
        assert name == "plain" and 'tree="auto" measures it' in reason
    assert machine_of("cuda", True) == "cuda compiled"


def test_a_calibration_keeps_the_pace(tmp_path: Path) -> None:
    made = Calibration((), pace=Pace(TOKENS, {"cpu eager": {"1": {"exact": {"jacobi-4": 0.5}}}}))
    made.save(tmp_path)
    assert Calibration.load(tmp_path) == made


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {"tokens": {}},
        {"tokens": [], "times": {}},
        {"tokens": {"exact": 3}, "times": {}},
        {"tokens": {"exact": {"tall": 3.0}}, "times": {}},
        {"tokens": {"exact": {"jacobi-4": 0.0}}, "times": {}},
        {"tokens": {"exact": {"jacobi-4": "3"}}, "times": {}},
        {"tokens": {}, "costs": {"cpu eager": {"jacobi-4": 1.5}}},
        {"tokens": {}, "times": {"cpu eager": {"exact": {"jacobi-4": 0.5}}}},
        {"tokens": {}, "times": {"cpu eager": {"none": {"exact": {"jacobi-4": 0.5}}}}},
        {"tokens": {}, "times": {"cpu eager": {"0": {"exact": {"jacobi-4": 0.5}}}}},
        {"tokens": {}, "times": {"cpu eager": {"1": {"exact": {"jacobi-4": -0.5}}}}},
    ],
)
def test_a_broken_pace_is_refused(broken: Any) -> None:
    with pytest.raises(FastgenError, match="cannot be read"):
        Calibration.of_dict({"levels": [], "pace": broken})


def row(variant: str, ratio: float, seconds: float, score: float | None = None) -> dict[str, Any]:
    rule = None if variant.startswith("plain") else variant.split()[0]
    return {
        "variant": variant,
        "rule": rule,
        "target_pass_ratio": ratio,
        "seconds": {"p50": seconds},
        "score": score,
        "stderr": None if score is None else 0.03,
    }


def test_a_benchmark_reports_pace_and_drops() -> None:
    """The fastest plain loop counts; rows of other settings, of another drafter, or of what was chosen do not."""
    rows = [
        row("plain loop, float32", 1.0, 3.0),
        row("plain loop, float32, compiled", 1.0, 2.0, 0.7) | {"pictures_a_minute": {"4": 60.0}},
        row("exact heads-4", 0.25, 1.0, 0.7) | {"pictures_a_minute": {"4": 90.0, "8": 90.0}},
        row("cascade heads-4x2 quality=0.5", 0.2, 1.2, 0.66),
        row("cascade heads-4x2 quality=1", 0.1, 1.2, 0.5),
        row("lantern heads-4 delta=0.2", 0.1, 9.0),
        row("exact chain-4@other", 0.1, 9.0),
        row("exact auto", 0.1, 9.0),
    ]
    data = {"rows": rows, "settings": {"device": "cpu", "compile": True}}
    level = Level(0.5, 0.1, 0.9, 2.0, 0.0, (9, 0, 0))
    made = Calibration((level,), {"a": 1}).with_results(data)
    assert made.pace is not None
    assert made.pace.tokens == {"exact": {"heads-4": 4.0}, "cascade": {"heads-4x2": 5.0}}
    assert made.pace.times == {
        "cpu compiled": {
            "1": {"exact": {"heads-4": 0.5}, "cascade": {"heads-4x2": 0.6}},
            "4": {"exact": {"heads-4": pytest.approx(2 / 3)}},  # in batches of 8 there is no plain loop to compare
        }
    }
    drop = made.levels[0].drops["heads-4x2"]
    assert drop.score == pytest.approx(0.04) and drop.stderr == pytest.approx(0.03 * 2**0.5)
    eager = {**data, "settings": {"device": "cpu", "compile": False}}
    assert made.with_results(eager).pace.times.keys() == {"cpu compiled", "cpu eager"}  # type: ignore[union-attr]
    # Times of two runs are multiples of two plain loops: a newer run
    # replaces the sources of a machine, batch and rule as a whole, and nothing else.
    newer = {**data, "rows": [row("plain loop, float32", 1.0, 1.0), row("exact heads-9", 0.2, 0.8)]}
    pace = made.with_results(newer).pace
    assert pace is not None
    kept = {"cascade": {"heads-4x2": 0.6}, "exact": {"heads-9": 0.8}}
    assert pace.times == {"cpu compiled": {"1": kept, "4": {"exact": {"heads-4": pytest.approx(2 / 3)}}}}
    assert pace.tokens["exact"] == {"heads-4": 4.0, "heads-9": 5.0} and pace.tokens["cascade"] == {"heads-4x2": 5.0}
    assert Calibration.of_dict(json.loads(json.dumps(made.as_dict()))) == made
    for broken in ({}, {"rows": rows}, {**data, "rows": rows[:2]}, {**data, "rows": [{}]}):
        with pytest.raises(FastgenError, match="--data"):
            made.with_results(broken)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path))
    return tmp_path / "speculative"


def test_a_choice_is_kept_for_its_key_alone(cache: Path) -> None:
    key = {"model": "a", "versions": {"torch": "1"}}
    assert load_choice(key) is None
    save_choice(key, "heads-16", "heads-16")
    assert load_choice(key) == ("heads-16", "heads-16")
    assert load_choice({"model": "a", "versions": {"torch": "2"}}) is None
    for widths in ("4-2-1", "1-1-1", "5"):
        save_choice(key, named_tree(widths), f"auto {widths}")
        found = load_choice(key)
        assert found is not None and found[1] == f"auto {widths}"
        assert torch.equal(found[0].parents, named_tree(widths).parents)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b'{"key": {}, "name": "jacobi-4", "paths": null}', "name", "paths"]
)
def test_a_broken_choice_is_ignored_with_one_line(cache: Path, content: Any) -> None:
    key = {"model": "a"}
    save_choice(key, "jacobi-4", "jacobi-4")
    (path,) = cache.iterdir()
    if isinstance(content, str):
        content = json.dumps({**json.loads(path.read_text()), content: "tall"}).encode()
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="measured again") as caught:
        assert load_choice(key) is None
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


def test_a_cache_that_cannot_be_written_is_reported(cache: Path) -> None:
    cache.write_text("a file")
    with pytest.warns(UserWarning, match="cannot be written"):
        save_choice({"model": "a"}, "jacobi-4", "jacobi-4")


def test_networks_have_fingerprints_of_their_own() -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    assert fingerprint(first) == fingerprint(first) != fingerprint(second)
    second.load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second) != fingerprint(first.double()) and fingerprint(None) is None
