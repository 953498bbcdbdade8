"""A round on the meta device, which has shapes and no values, in place of a GPU.

A tensor left on the CPU raises, and so does any look at a value (`.item()`, a mask as an index, a copy to the host):
what would stop a GPU inside a round.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from long_tail import long_tail
from micro_models import PROMPTS
from transformers import JanusForConditionalGeneration

from fastgen.drafters.decode import Rounds
from fastgen.drafters.drafter import Drafter, describe
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.heads import WindowHeads
from fastgen.drafters.heads_source import HeadsSource
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.loading import build_rule
from fastgen.drafters.medusa import MedusaDrafter
from fastgen.drafters.names import RULES
from fastgen.drafters.sources import DraftSource, JacobiSource, TreeSource
from fastgen.drafters.targets import Target, target_of
from fastgen.drafters.tree import DynamicShape, named_tree
from fastgen.kernels.tree_verify import reference
from fastgen.pipelines.janus import JanusImagePipeline

SOURCES = ["jacobi", "jacobi coupled", "jacobi wide", "heads", "heads wide", "eagle-1", "eagle-3", "medusa", "dynamic"]


def make_drafter(target: Target, name: str) -> Drafter:
    if name == "medusa":
        return MedusaDrafter.for_target(target, depth=3)
    return EagleDrafter.for_target(target, heads=2, variant=3 if name == "eagle-3" else 1)


def make_heads(target: Target) -> WindowHeads:
    return WindowHeads(**describe(target), window=4, row_length=4, width=8, heads=2, taps=(1,))


def make_source(target: Target, name: str) -> DraftSource:
    """Trees are planned on the host, before."""
    if name.startswith("jacobi"):
        return JacobiSource(4, width=2 if "wide" in name else 1, coupled="coupled" in name)
    if name.startswith("heads"):
        return HeadsSource(make_heads(target), 4, width=2 if "wide" in name else 1, wide_places=2)
    if name == "dynamic":
        return TreeSource(make_drafter(target, name), DynamicShape(6, 3, 2), sampled=False)
    return TreeSource(make_drafter(target, name), named_tree("3-2-1"), sampled=True)


def two_rounds(janus: JanusImagePipeline, target: Target, name: str, rule: str, law: TokenLaw) -> Rounds:
    source = copy.copy(make_source(target, name))
    settings: dict[str, Any] = {"radius": 0.5, "sensitivity": 1.0} if rule == "cascade" else {}
    with torch.no_grad():
        with torch.device("meta"):
            model = JanusForConditionalGeneration(janus.model.config).requires_grad_(False)
            model.generation_config = janus.model.generation_config
            fake = target_of(model, janus.tokenizer)
            if isinstance(source, TreeSource):
                source.drafter = make_drafter(fake, name)
            if isinstance(source, HeadsSource):
                source.heads = make_heads(fake)
        prefix = fake.prefix(PROMPTS[:2], law.guided).watched()
        made = build_rule(rule, fake, **settings)
        rounds = Rounds(fake, source, made, prefix, law, [torch.Generator(), torch.Generator()])
        for _ in range(2):
            rounds.round()
        return rounds


@pytest.mark.parametrize(
    ("name", "temperature"), [*((name, 1.0) for name in SOURCES), ("jacobi", 0.0), ("dynamic", 0.0)]
)
def test_no_source_stops_the_gpu(janus: JanusImagePipeline, target: Target, name: str, temperature: float) -> None:
    law = TokenLaw(3.0, temperature, top_k=20, top_p=0.9)
    rounds = two_rounds(janus, target, name, "exact", law)
    assert rounds.count.device.type == rounds.tokens.device.type == "meta"


@pytest.mark.parametrize("rule", long_tail(RULES, fast=("exact", "cascade")))
def test_no_rule_stops_the_gpu(janus: JanusImagePipeline, target: Target, rule: str) -> None:
    for name in {"block": ["jacobi"], "cascade": ["eagle-1", "heads wide", "heads"]}.get(rule, ["eagle-1"]):
        rounds = two_rounds(janus, target, name, rule, TokenLaw(3.0, 0.9, top_p=0.9))
        assert rounds.count.device.type == "meta"
        for images, lengths, counts in rounds.rounds:
            assert {value.device.type for value in (images, lengths, *counts.values())} == {"meta"}


def test_a_host_synchronisation_would_be_detected(
    janus: JanusImagePipeline, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = reference.reject

    def looking(*arguments: Any) -> Any:
        outcome = real(*arguments)
        if bool((outcome.slot >= 0).any()):
            return outcome
        return outcome

    monkeypatch.setattr(reference, "reject", looking)
    with pytest.raises(RuntimeError, match="meta"):
        two_rounds(janus, target, "eagle-1", "exact", TokenLaw(3.0))
