"""A micro Janus as target, and the target as its own drafter."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_pipelines import loaded

from fastgen.drafters.targets import Target, target_of
from fastgen.pipelines.janus import JanusImagePipeline


@pytest.fixture(scope="session")
def janus(micro_janus: Path) -> JanusImagePipeline:
    return loaded(JanusImagePipeline, micro_janus)


@pytest.fixture(scope="session")
def target(janus: JanusImagePipeline) -> Target:
    return target_of(janus.model.requires_grad_(False), janus.tokenizer)
