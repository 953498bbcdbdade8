"""Hardware-aware sizing: the tree with most tokens a second, against all trees of a small family."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from long_tail import long_tail
from micro_models import PROMPTS
from oracle_drafter import OracleDrafter
from toy_speculation import Toy

from fastgen.drafters import auto
from fastgen.drafters.acceptance import Block, Exact
from fastgen.drafters.auto import Costs, Planner, _Recorder, best_tree, choose_source
from fastgen.drafters.calibration import Calibration
from fastgen.drafters.cascade import Cascade, CascadeConfig
from fastgen.drafters.decode import decode_plain, decode_speculative
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.names import check_tree_name, is_tree_name, window_of
from fastgen.drafters.sources import JacobiSource, TreeSource
from fastgen.drafters.targets import Target
from fastgen.drafters.tree import named_tree
from fastgen.drafters.verify import strict, walk


def slow_plain(now: list[float]) -> Any:
    """The plain loop, on a clock by which it takes for ever."""

    def decode(*args: Any, **kwargs: Any) -> Any:
        now[0] += 1e9
        return decode_plain(*args, **kwargs)

    return decode


RATES = st.lists(st.lists(st.floats(0.05, 0.95), min_size=2, max_size=2), min_size=2, max_size=2)


def tokens_of(paths: list[tuple[int, ...]], rates: list[list[float]]) -> float:
    """Expected tokens of a round by following every path."""

    def reach(path: tuple[int, ...]) -> float:
        chance = 1.0
        for depth, rank in enumerate(path):
            for earlier in range(rank):
                chance *= 1 - rates[depth][earlier]
            chance *= rates[depth][rank]
        return chance

    return 1.0 + sum(reach(path) for path in paths)


def all_trees() -> list[list[tuple[int, ...]]]:
    """Every tree of depth 2 with at most two children."""
    nodes = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    found = []
    for size in range(1, 7):
        for subset in itertools.combinations(nodes, size):
            whole = all(
                (len(node) == 1 or node[:-1] in subset) and (node[-1] == 0 or (*node[:-1], 0) in subset)
                for node in subset
            )
            if whole:
                found.append(list(subset))
    return found


@given(rates=RATES, per_node=st.floats(0.01, 1.0), per_level=st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_no_tree_is_faster(rates: list[list[float]], per_node: float, per_level: float) -> None:
    """Of each size the one of most tokens, and of all the one of most tokens a second."""
    costs, planner = Costs(1.0, per_node, per_level), Planner(rates, 2)
    for count in range(1, 7):
        paths = [tuple(path) for path in planner.paths(count)]
        rivals = [tokens_of(tree, rates) for tree in all_trees() if len(tree) == count]
        assert len(paths) == count and tokens_of(paths, rates) == pytest.approx(max(rivals))
        assert 1 + planner.value(0, 0, count) == pytest.approx(max(rivals))
    tree = best_tree(rates, costs, most=6)
    speeds = [tokens_of(rival, rates) / costs.of(len(rival) + 1, max(map(len, rival))) for rival in all_trees()]
    chosen = 1 + Planner(rates, tree.max_depth).value(0, 0, tree.n - 1)
    assert chosen / costs.of(tree.n, tree.max_depth) == pytest.approx(max(speeds))


def test_costs_decide() -> None:
    """Free nodes: as many as allowed. Dear ones: a single token. Dear levels: wide, not deep."""
    rates = [[0.5, 0.3, 0.2]] * 3
    assert best_tree(rates, Costs(1.0, 1e-9, 1e-9), most=20).n == 21
    assert best_tree(rates, Costs(1.0, 50.0, 0.0)).n == 2
    assert best_tree(rates, Costs(1.0, 0.01, 50.0)).max_depth == 1
    with pytest.raises(ValueError, match="ever accepted"):
        best_tree([[0.0]], Costs(1.0, 1.0, 1.0))


def test_recorded_rates_predict_the_accepted_length() -> None:
    """On a toy: rates of one tree give its own mean length within five standard errors."""
    toy, tree, batch = Toy.random(6, seed=2), named_tree("3-4-2"), 20_000
    generator = torch.Generator().manual_seed(0)
    drafted = toy.draft(tree, torch.tensor([[0, 1]]).expand(batch, 2), True, generator)
    noise = toy.noise(batch, tree, generator)
    recorder = _Recorder(3, tree.max_children)
    recorder.verify(drafted, noise, torch.zeros(batch))
    lengths = walk(drafted, strict(drafted, noise), noise, torch.full((batch,), 99)).length.double()
    # The first level is one node, so its rates are exact; deeper ones are means over nodes that are not alike.
    first = recorder.rates[0]
    assert len(first) == 3
    refused = 1.0
    for rate in first:
        refused *= 1 - rate
    share = float((lengths > 0).double().mean())
    assert abs(1 - refused - share) < 5 * (share * (1 - share) / batch) ** 0.5


def test_a_choice_for_a_real_target(target: Target) -> None:
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:1], True)
    for rule in (Exact(), Block()):
        source, name = choose_source(target, None, rule, prefix, TokenLaw(3.0), repeats=1)
        if source is None:
            assert name == "plain"
        else:
            assert isinstance(source, JacobiSource) and name == f"jacobi-{source.window}"
            assert source.coupled == (rule.name == "exact")


def test_the_plain_loop_wins_where_nothing_pays(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock by which a round takes a thousand times as long as a token of the plain loop."""
    now = [0.0]

    def timed(decode: Any, cost: float) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            decoded = decode(*args, **kwargs)
            now[0] += decoded.target_passes * cost
            return decoded

        return run

    monkeypatch.setattr(auto, "decode_speculative", timed(decode_speculative, 1000.0))
    monkeypatch.setattr(auto, "decode_plain", timed(decode_plain, 1.0))
    monkeypatch.setattr(auto, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(auto, "WINDOWS", (2, 4))
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:1], True)
    assert choose_source(target, None, Exact(), prefix, TokenLaw(3.0), repeats=1) == (None, "plain")


def test_wide_windows_for_a_rule_that_compares_candidates(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock by which a pass costs as much as it is narrow: the wide ones win where they are tried at all."""
    now = [0.0]

    def decode(target: Target, source: Any, *args: Any, **kwargs: Any) -> Any:
        decoded = decode_speculative(target, source, *args, **kwargs)
        now[0] += decoded.target_passes / source.width**4
        return decoded

    monkeypatch.setattr(auto, "decode_speculative", decode)
    monkeypatch.setattr(auto, "decode_plain", slow_plain(now))
    monkeypatch.setattr(auto, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(auto, "WINDOWS", (2, 4))
    monkeypatch.setattr(auto, "WIDE_WINDOWS", ("jacobi-2x3",))
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:1], True)
    source, name = choose_source(target, None, Cascade(CascadeConfig()), prefix, TokenLaw(3.0), repeats=1)
    assert isinstance(source, JacobiSource) and name == "jacobi-2x3" and source.width == 3 and source.coupled
    _, name = choose_source(target, None, Exact(), prefix, TokenLaw(3.0), repeats=1)
    assert name in ("jacobi-2", "jacobi-4")


def test_what_the_default_may_take_is_tried(repository: Path) -> None:
    """Else a measured choice could be slower than the one by the embedded times."""
    pace = Calibration.load(repository / "fastgen" / "assets" / "tiny-janus" / "drafter").pace
    assert pace is not None
    names = {
        name for sizes in pace.times.values() for rules in sizes.values() for row in rules.values() for name in row
    }
    assert len(names) >= 4 and {window_of(name)[0] for name in names} <= set(auto.WINDOWS)


def test_names_of_windows() -> None:
    wide = JacobiSource.of_name("jacobi-12x4", Exact())
    assert (wide.window, wide.width, wide.coupled, wide.nodes) == (12, 4, True, 49)
    partly = JacobiSource.of_name("jacobi-12x4-3", Exact())
    assert (partly.window, partly.width, partly.wide_places, partly.nodes) == (12, 4, 3, 22)
    assert [len(level) for level in partly.tree.levels] == [1, 4, 4, 4, *[1] * 9]
    assert JacobiSource.of_name("jacobi-7", Exact()).width == 1
    assert all(is_tree_name(name) for name in ("jacobi-12x4", "jacobi-12", "heads-12x2-4"))
    with pytest.raises(ValueError, match="tree: 'heads-4x2-5' has candidates at 5 places, the window has 4"):
        check_tree_name("tree", "heads-4x2-5")
    for name in ("jacobi-12x0", "jacobi-0", "jacobi-12x", "jacobi-x4", "12x4", "jacobi-3-2", "jacobi-3x2-0"):
        assert not is_tree_name(name)
        with pytest.raises(ValueError, match="is not a window"):
            JacobiSource.of_name(name, Exact())


@pytest.mark.parametrize("dear", long_tail(["trees", "windows"], fast=("trees",)))
def test_windows_are_tried_as_well_as_the_tree(target: Target, dear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock on which a pass of one kind of source takes a hundred times as long as one of the other."""
    now = [0.0]

    def decode(target: Target, source: Any, *args: Any, **kwargs: Any) -> Any:
        decoded = decode_speculative(target, source, *args, **kwargs)
        kind = "trees" if isinstance(source, TreeSource) else "windows"
        now[0] += decoded.target_passes * (100.0 if kind == dear else 1.0)
        return decoded

    monkeypatch.setattr(auto, "decode_speculative", decode)
    monkeypatch.setattr(auto, "decode_plain", slow_plain(now))
    monkeypatch.setattr(auto, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(auto, "WINDOWS", (2, 4))
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:1], True)
    for law in (TokenLaw(3.0), TokenLaw(3.0, 0.0)):
        source, name = choose_source(target, OracleDrafter(0.5), Exact(), prefix, law, repeats=1)
        if dear == "windows":
            assert isinstance(source, TreeSource) and name.startswith("auto ")
            assert source.sampled == (law.temperature > 0)
        else:
            assert isinstance(source, JacobiSource) and name in ("jacobi-2", "jacobi-4")
