"""The embedded DC-DiT: what its training was for, on few samples; scores are in docs/results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

import fastgen
from fastgen import _assets
from fastgen.evaluation.benchmarks.router_statistics import router_statistics
from fastgen.pipelines.loading import load_pipeline


@pytest.fixture(scope="module")
def pipe() -> ZImagePipeline:
    loaded = load_pipeline("small-dc")
    assert isinstance(loaded, ZImagePipeline)
    return loaded


def test_the_router_keeps_its_share_at_every_noise_level_and_rather_boundaries(pipe: ZImagePipeline) -> None:
    found = router_statistics(pipe, renders=16, seed=1, size=128)
    share = 1 / pipe.transformer.config.compression
    assert all(share / 2 <= row["kept"] <= 2 * share for row in found["rows"])
    assert found["boundary_to_background"] > 1


def test_a_stock_pipeline_takes_the_transformer(pipe: ZImagePipeline) -> None:
    transformer = fastgen.DCZImageTransformer2DModel.from_pretrained(_assets.ROOT / "small-dc" / "transformer")
    parts = {"transformer": transformer, "scheduler": pipe.scheduler}
    stock = ZImagePipeline.from_pretrained(_assets.ROOT / "tiny", **parts, torch_dtype=torch.float32)
    stock.transformer.float()
    stock.set_progress_bar_config(disable=True)
    settings = {"height": 128, "width": 128, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    first, second = (
        p("a red circle", generator=torch.Generator().manual_seed(0), **settings).images[0] for p in (stock, pipe)
    )
    np.testing.assert_allclose(first, second, atol=1e-4)
