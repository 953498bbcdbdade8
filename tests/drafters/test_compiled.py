"""Compiled steps: one graph without a break (so without a decision on the host), and the tokens of the eager step.

Most tests capture the whole graph and run it operator by operator, which takes seconds; `inductor` is slow and runs
behind the marker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from long_tail import long_tail
from micro_models import JANUS_TOKENS, PROMPTS
from torch._dynamo.testing import CompileCounterWithBackend

from fastgen.drafters import decode
from fastgen.drafters.compiled import compiled, many_graphs
from fastgen.drafters.decode import decode_plain, decode_speculative
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.heads import WindowHeads
from fastgen.drafters.heads_source import HeadsSource
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.loading import build_rule
from fastgen.drafters.medusa import MedusaDrafter
from fastgen.drafters.names import RULES
from fastgen.drafters.sources import DraftSource, JacobiSource, TreeSource
from fastgen.drafters.targets import Target
from fastgen.drafters.tree import DynamicShape, named_tree

LAW = TokenLaw(3.0, 0.9, top_k=30, top_p=0.95)


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts graphs; a break raises."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")

    def capture(step: Callable[..., Any]) -> Any:
        return torch.compile(step, backend=counter, fullgraph=True, dynamic=False)

    monkeypatch.setattr(decode, "compiled", capture)
    yield counter
    torch._dynamo.reset()


def make_source(target: Target, name: str) -> DraftSource:
    torch.manual_seed(0)
    if name.startswith("jacobi"):
        return JacobiSource(4, width=2 if "wide" in name else 1, coupled="coupled" in name)
    if name == "heads":
        return HeadsSource(WindowHeads.for_target(target, window=4, width=16, heads=2, taps=(1,)).eval(), 4)
    if name == "medusa":
        return TreeSource(MedusaDrafter.for_target(target, depth=3), named_tree("3-2-1"), sampled=True)
    eagle = EagleDrafter.for_target(target, variant=3 if "3" in name else 1, heads=2)
    if "dynamic" in name:
        return TreeSource(eagle, DynamicShape(nodes=6, depth=3, top_k=2), sampled=False)
    return TreeSource(eagle, named_tree("3-3-1"), sampled=True)


@pytest.mark.parametrize(
    "name",
    long_tail(
        ["jacobi", "jacobi coupled", "jacobi wide", "eagle-1", "eagle-3", "dynamic", "medusa", "heads"],
        fast=("jacobi", "dynamic", "heads"),
    ),
)
def test_a_round_is_one_graph_and_draws_the_same(target: Target, graphs: CompileCounterWithBackend, name: str) -> None:
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:2], True)
    rule, results = build_rule("exact", target), []
    for compile in (False, True):
        source = make_source(target, name)
        results.append(decode_speculative(target, source, rule, prefix, LAW, seeded(2), compile=compile))
    assert torch.equal(results[0].tokens, results[1].tokens) and results[0].accepted == results[1].accepted
    assert graphs.frame_count == 1


@pytest.mark.parametrize(("batch", "sizes"), [(1, [1]), (3, [3]), (8, [8, 4]), (16, [16, 8, 4]), (35, [35, 17, 8])])
def test_sizes_of_compiled_rounds_are_few(batch: int, sizes: list[int]) -> None:
    assert decode._sizes(batch) == sizes


def test_images_that_are_done_leave_compiled_rounds(target: Target, graphs: CompileCounterWithBackend) -> None:
    """A graph for the whole batch and for its half, and every image is what it is without compilation."""
    with torch.no_grad():
        prefix = target.prefix([PROMPTS[number % len(PROMPTS)] for number in range(8)], True)
    rule, made = build_rule("exact", target), []
    for compile in (False, True):
        source = make_source(target, "jacobi coupled")
        made.append(decode_speculative(target, source, rule, prefix, LAW, seeded(8), compile=compile))
    assert torch.equal(made[0].tokens, made[1].tokens) and torch.equal(made[0].rounds, made[1].rounds)
    # Half of them need fewer rounds than the slowest.
    assert int(made[1].rounds.sort().values[3]) < int(made[1].rounds.max()) and graphs.frame_count == 2


@pytest.mark.parametrize(
    "rule",
    long_tail(
        [*(name for name in RULES if name != "exact"), "cascade on a chain"],
        fast=("block", "cascade", "cascade on a chain"),
    ),
)
def test_every_rule_is_captured(target: Target, graphs: CompileCounterWithBackend, rule: str) -> None:
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:2], True)
    relaxed = {"breadth": 0.2, "radius": 0.5, "sensitivity": 1.0}
    made, results = build_rule(rule.split()[0], target, **(relaxed if rule.startswith("cascade") else {})), []
    for compile in (False, True):
        chain = rule in ("block", "cascade on a chain")
        source: DraftSource = JacobiSource(3, coupled=False) if chain else make_source(target, "eagle-1")
        results.append(decode_speculative(target, source, made, prefix, LAW, seeded(2), compile=compile))
    assert torch.equal(results[0].tokens, results[1].tokens)
    for name, value in results[0].counts.items():
        assert torch.allclose(value.double(), results[1].counts[name].double(), atol=1e-4)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("temperature", long_tail([0.0, 1.0], fast=(1.0,)))
def test_the_plain_step_serves_prompts_of_all_lengths(
    target: Target, graphs: CompileCounterWithBackend, temperature: float
) -> None:
    law = TokenLaw(3.0, temperature)
    lengths = set()
    for prompt in PROMPTS[:3]:
        with torch.no_grad():
            prefix = target.prefix([prompt], True)
        lengths.add(prefix.mask.shape[1])
        eager = decode_plain(target, prefix, law, seeded(1))
        assert torch.equal(decode_plain(target, prefix, law, seeded(1), compile=True).tokens, eager.tokens)
    assert len(lengths) > 1 and graphs.frame_count == 1


def test_pads_change_nothing(target: Target) -> None:
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:1], True)
        padded = prefix.padded(16)
        assert padded.mask.shape[1] % 16 == 0 and padded.static and padded.mask.shape[1] > prefix.mask.shape[1]
        caches = [target.new_cache(p, 4) for p in (prefix, padded)]
        hidden = [target.prefill(p, cache).hidden for p, cache in zip((prefix, padded), caches, strict=True)]
    length = prefix.mask.shape[1]
    assert torch.allclose(hidden[0], hidden[1][:, -length:], atol=1e-5)
    assert caches[1].bound == caches[1].capacity and caches[0].bound < caches[0].capacity


@pytest.mark.slow
def test_inductor_draws_the_same(target: Target) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        prefix = target.prefix(PROMPTS[:2], True)
    rule, source = build_rule("exact", target), make_source(target, "eagle-1")
    greedy = TokenLaw(3.0, 0.0)
    eager = decode_plain(target, prefix, greedy, seeded(2)).tokens
    assert torch.equal(decode_plain(target, prefix, greedy, seeded(2), compile=True).tokens, eager)
    drawn = decode_speculative(target, source, rule, prefix, LAW, seeded(2)).tokens
    for _ in range(2):  # the second time nothing is compiled
        again = decode_speculative(target, source, rule, prefix, LAW, seeded(2), compile=True)
        assert torch.equal(again.tokens, drawn) and again.tokens.shape == (2, JANUS_TOKENS)


def test_more_graphs_than_usual_are_allowed_inside_only() -> None:
    before = torch._dynamo.config.recompile_limit
    with many_graphs(True):
        assert torch._dynamo.config.recompile_limit > before
    assert torch._dynamo.config.recompile_limit == before
    assert compiled(len) is compiled(len)
