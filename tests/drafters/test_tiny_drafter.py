"""The embedded drafter of tiny-janus: lossless where it says so, and worth its passes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from fastgen.data.shapes import ShapesWorld
from fastgen.drafters.acceptance import Exact
from fastgen.drafters.calibration import Calibration
from fastgen.drafters.decode import decode_plain, decode_speculative
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.loading import build_rule, load_drafter
from fastgen.drafters.sources import TreeSource
from fastgen.drafters.targets import Target, target_of
from fastgen.drafters.tree import named_tree
from fastgen.pipelines.loading import load_pipeline
from fastgen.pipelines.loading.checkpoint import find_checkpoint
from fastgen.pipelines.speculative import DEFAULT_QUALITY, DEFAULT_TREE

PROMPTS = list(ShapesWorld(31_337).batch(20).texts)


@pytest.fixture(scope="module")
def target() -> Target:
    pipe: Any = load_pipeline("tiny-janus", dtype="float32")
    return target_of(pipe.model, pipe.tokenizer)


@pytest.fixture(scope="module")
def drafter() -> Any:
    folder = find_checkpoint("tiny-janus").drafter
    assert folder is not None and sum(path.stat().st_size for path in folder.iterdir()) < 3e6
    return load_drafter(folder, torch.float32)


@pytest.mark.slow
@torch.no_grad()
def test_greedy_pictures_are_the_plain_loops(target: Target, drafter: Any) -> None:
    """Token for token in float32, 20 prompts with guidance."""
    law = TokenLaw(4.0, temperature=0.0)
    prefix = target.prefix(PROMPTS, True)
    generators = [torch.Generator() for _ in PROMPTS]
    plain = decode_plain(target, prefix, law, generators).tokens
    source = TreeSource(drafter, named_tree(DEFAULT_TREE), sampled=False)
    decoded = decode_speculative(target, source, Exact(), prefix, law, generators)
    assert torch.equal(decoded.tokens, plain)
    assert float(decoded.rounds.double().mean()) < 0.75 * target.num_tokens


@torch.no_grad()
def test_sampled_pictures_take_a_third_of_the_passes(target: Target, drafter: Any) -> None:
    """Temperature 1 with guidance: at most 0.55 passes a token with the exact rule, 0.33 with CASCADE by default."""
    law, some = TokenLaw(4.0), PROMPTS[:2]
    prefix = target.prefix(some, True)
    folder = find_checkpoint("tiny-janus").drafter
    assert folder is not None
    calibrated = build_rule("cascade", target, **asdict(Calibration.load(folder).config(DEFAULT_QUALITY)))
    shares = []
    for rule in (Exact(), calibrated):
        source = TreeSource(drafter, named_tree(DEFAULT_TREE), sampled=True)
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(some))]
        rounds = decode_speculative(target, source, rule, prefix, law, generators).rounds
        shares.append(float((rounds + 1).double().mean()) / target.num_tokens)
    assert shares[0] <= 0.55 and shares[1] <= 0.33 and shares[1] < shares[0]
