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
    loaded = load_pipeline("tiny-dc")
    assert isinstance(loaded, ZImagePipeline)
    return loaded


def test_the_router_keeps_boundaries_and_more_of_them_as_the_picture_clears(pipe: ZImagePipeline) -> None:
    found = router_statistics(pipe, renders=32, seed=1)
    kept = [row["kept"] for row in found["rows"]]
    assert found["boundary_to_background"] >= 2
    assert kept[-1] > kept[0] and np.corrcoef(kept, np.arange(len(kept)))[0, 1] > 0.5


def test_a_stock_pipeline_takes_the_transformer(pipe: ZImagePipeline) -> None:
    transformer = fastgen.DCZImageTransformer2DModel.from_pretrained(_assets.ROOT / "tiny-dc" / "transformer")
    stock = ZImagePipeline.from_pretrained(_assets.ROOT / "tiny", transformer=transformer, torch_dtype=torch.float32)
    stock.transformer.float()
    stock.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np"}
    first, second = (
        p("a red circle", generator=torch.Generator().manual_seed(0), **settings).images[0] for p in (stock, pipe)
    )
    np.testing.assert_allclose(first, second, atol=1e-4)
