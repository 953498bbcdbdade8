"""`fastgen.summary` and `fastgen.info`, and the signatures of our pipelines."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiTPipeline, ZImagePipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

import fastgen
from fastgen.pipelines.janus import JanusImagePipeline

# NoiseSearchPipeline passes its arguments on to the pipeline that it wraps.
OURS = [
    fastgen.DCDiTPipeline,
    fastgen.DCZImagePipeline,
    JanusImagePipeline,
    fastgen.SpeculativeImagePipeline,
]


@pytest.mark.parametrize("kind", OURS)
def test_every_pipeline_of_ours_names_its_arguments(kind: Any) -> None:
    assert issubclass(kind, DiffusionPipeline)
    kinds = {parameter.kind for parameter in inspect.signature(kind.__call__).parameters.values()}
    assert not kinds & ({inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD})


@pytest.mark.parametrize(
    ("ours", "stock"), [(fastgen.DCDiTPipeline, DiTPipeline), (fastgen.DCZImagePipeline, ZImagePipeline)]
)
def test_arguments_of_the_stock_pipeline_have_its_defaults(ours: Any, stock: Any) -> None:
    mine = inspect.signature(ours.__call__).parameters
    for name, parameter in inspect.signature(stock.__call__).parameters.items():
        default = parameter.default
        assert mine[name].default == (tuple(default) if isinstance(default, list) else default), name


def test_summary_shows_what_is_on_and_the_last_call(micro_z: Path) -> None:
    pipe = fastgen.load_pipeline(str(micro_z))
    found = fastgen.summary(pipe)
    assert (found.on, found.loss, found.last) == ({}, "exact", None) and "last call: none" in str(found)
    plan = fastgen.accelerate(pipe)
    assert list(fastgen.summary(pipe).on) == [row.part.name for row in plan.rows if row.on]
    fastgen.restore(pipe)
    assert fastgen.summary(pipe).on == {}
    list(fastgen.generate_images(pipe, ["a ring"], [0], steps=2, height=16, width=16))
    last = fastgen.summary(pipe).last
    assert last is not None and last.nfe > 0 and f"{last.nfe} NFE" in str(fastgen.summary(pipe))
    with pytest.raises(fastgen.FastgenError, match="^pipe: "):
        fastgen.summary("tiny")


def test_summary_of_a_pipeline_of_ours_is_lossy(micro_dc: Path) -> None:
    pipe = fastgen.load_pipeline(str(micro_dc))
    pipe("a ring", num_inference_steps=2, height=16, width=16, output_type="np")
    found = fastgen.summary(pipe)
    assert found.loss == "lossy" and found.last is not None and found.last.kept_tokens


def test_info_is_what_the_command_shows() -> None:
    assert {"fastgen", "packages", "devices", "fast_paths"} <= fastgen.info().keys()
