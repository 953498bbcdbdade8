"""`fastgen.summary` and `fastgen.info`, and the signatures of our pipelines."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, ZImagePipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from micro_models import micro_dc_dit

import fastgen
from fastgen.pipelines.janus import JanusImagePipeline

OURS = [
    fastgen.DCDiTPipeline,
    fastgen.DCZImagePipeline,
    JanusImagePipeline,
    fastgen.NoiseSearchPipeline,
    fastgen.SpeculativeImagePipeline,
]


@pytest.mark.parametrize("kind", OURS)
def test_every_pipeline_of_ours_names_its_arguments(kind: Any) -> None:
    assert issubclass(kind, DiffusionPipeline)
    parameters = inspect.signature(kind.__call__).parameters
    unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    assert not [name for name, parameter in parameters.items() if parameter.kind in unnamed]
    assert {"generator", "output_type", "return_dict"} <= parameters.keys()


def _brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.float().mean((1, 2, 3))


@pytest.fixture(scope="module")
def made(micro_z: Path, micro_dc: Path, micro_janus: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """A pipeline of each class, with the arguments of a call."""
    seed = {"generator": torch.Generator().manual_seed(0)}
    drawn = seed | {"prompt": "a ring", "num_inference_steps": 2, "height": 16, "width": 16}
    load = fastgen.load_pipeline
    found: dict[str, tuple[Any, dict[str, Any]]] = {
        "DCDiTPipeline": (micro_dc_dit(), seed | {"class_labels": [1], "num_inference_steps": 2}),
        "DCZImagePipeline": (load(str(micro_dc)), drawn),
        "JanusImagePipeline": (load(str(micro_janus)), seed | {"prompt": "a ring"}),
        "NoiseSearchPipeline": (
            fastgen.NoiseSearchPipeline(load(str(micro_z)), _brightness, "best-of-n"),
            drawn | {"max_nfe": 8},
        ),
        "SpeculativeImagePipeline": (load(str(micro_janus), method="speculative"), seed | {"prompt": "a ring"}),
    }
    return found


@pytest.mark.parametrize("kind", OURS)
def test_every_pipeline_returns_the_same_stats(kind: Any, made: dict[str, tuple[Any, dict[str, Any]]]) -> None:
    pipe, arguments = made[kind.__name__]
    assert type(pipe) is kind
    output = pipe(**arguments)
    assert type(output.stats) is fastgen.Stats and output.stats.wall_seconds > 0 and output.stats.seconds
    assert output.stats.nfe or output.stats.passes["target"]
    assert fastgen.summary(pipe).last is output.stats and json.loads(json.dumps(output.stats.as_dict()))
    assert (output.stats.acceptance is not None) == (kind is fastgen.SpeculativeImagePipeline)
    with pytest.raises(AttributeError, match="closed"):
        output.stats.nfe = 0
    assert len(pipe(**arguments, return_dict=False)[0]) == len(output.images)


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


def test_a_direct_call_and_generate_images_report_the_same(micro_dc: Path) -> None:
    """The pipeline reports its stages itself; `generate_images` around it reports nothing twice."""
    pipe = fastgen.load_pipeline(str(micro_dc))
    size = {"height": 16, "width": 16, "guidance_scale": 2.0}
    direct = pipe("a ring", num_inference_steps=2, generator=torch.Generator().manual_seed(0), **size).stats
    (picture,) = fastgen.generate_images(pipe, ["a ring"], [0], steps=2, **size)
    for stats in (direct, picture.stats):
        assert (stats.passes, stats.nfe, len(stats.kept_tokens)) == ({"denoiser": 2}, 4, 2)
        assert {"text", "denoise", "decode"} == stats.seconds.keys()
    for part in (pipe.transformer, pipe.vae.decoder):
        assert not part._forward_pre_hooks and not part._forward_hooks
