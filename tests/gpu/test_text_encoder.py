"""Text encoders leave a GPU that is short of memory."""

from __future__ import annotations

from typing import Any

import torch

import fastgen
from fastgen.pipelines.accelerate.parts import TextEncoder
from fastgen.pipelines.loading import load_pipeline


def test_text_encoders_wait_in_main_memory_while_the_denoiser_works() -> None:
    pipe: Any = load_pipeline("tiny", device="cuda")
    where: list[str] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *given: where.append(pipe.text_encoder.device.type))

    def draw(prompt: str) -> Any:
        call = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
        return pipe(prompt, generator=torch.Generator("cuda").manual_seed(0), **call)[0]

    expected = [draw(prompt) for prompt in ("a red circle", "a blue square")]
    where.clear()
    with fastgen.accelerated(pipe, plan=[TextEncoder(free="always")]):
        drawn = [draw(prompt) for prompt in ("a red circle", "a blue square")]
    hook.remove()
    assert set(where) == {"cpu"} and pipe.text_encoder.device.type == "cuda"
    torch.testing.assert_close(drawn, expected, atol=1e-3, rtol=0)
