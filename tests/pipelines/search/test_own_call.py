"""Threshold search on `tiny` by the pipeline's own call is that by the adapter of its family."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastgen.evaluation.shapesworld import shapes_prompts
from fastgen.evaluation.verifiers.names import load_verifier
from fastgen.pipelines.loading import load_pipeline
from fastgen.pipelines.noise_search import NoiseSearchPipeline
from fastgen.pipelines.search.denoisers.stock import StockDenoiser

CALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 12, "guidance_scale": 2.0, "max_nfe": 100}


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=() if number == 0 else pytest.mark.slow) for number in range(0, 360, 30)]
)
def test_threshold_search_by_the_own_call_is_that_by_the_adapter(number: int) -> None:
    pipe = load_pipeline("tiny", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    verifier, prompt = load_verifier("shapes-verifier"), shapes_prompts()[number].prompt
    found = []
    for own in (False, True):
        search = NoiseSearchPipeline(pipe, verifier, "threshold")
        if own:
            search._denoiser = StockDenoiser
        else:
            assert search._denoiser is not StockDenoiser
        found.append(search(prompt, generator=torch.Generator().manual_seed(number), output_type="np", **CALL))
    adapter, call = (output.reports[0] for output in found)
    assert adapter.nfe == call.nfe and adapter.policy == call.policy and adapter.starts == call.starts
    assert abs(adapter.score - call.score) < 0.02
    assert float(np.abs(found[0].images - found[1].images).max()) < 0.03
