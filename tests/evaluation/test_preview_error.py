"""Errors of previews: none where there is none, and the order of scores where it is turned round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from torch import Tensor

from fastgen.evaluation.preview_error import preview_error
from fastgen.pipelines.loading import load_pipeline
from fastgen.pipelines.search.denoisers.base import Settings

SETTINGS = Settings(3, 2.0, 32, 32)
PROMPTS = ["a red circle", "two rings"]


@pytest.fixture(scope="module")
def plain(micro_z: Path) -> Any:
    pipe = ZImagePipeline.from_pretrained(micro_z, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    assert len(images) == len(prompts) and images.dtype == torch.uint8
    return images.float().mean(dim=(1, 2, 3))


def test_full_previews_have_no_error(plain: Any) -> None:
    found = preview_error(plain, PROMPTS, 3, preview="full", verifier=brightness, settings=SETTINGS, batch_size=6)
    assert found.pixels == [0.0] * 3 and found.ranks == pytest.approx([1.0] * 3) and len(found.times) == 3
    assert set(found.seconds) == {"denoise", "decode"}


def test_pooled_previews_do_not_depend_on_the_batch(plain: Any) -> None:
    found = preview_error(plain, PROMPTS, 2, preview="pooled", verifier=brightness, settings=SETTINGS)
    assert all(error > 0 for error in found.pixels) and {"denoise", "decode", "preview"} == set(found.seconds)
    again = preview_error(plain, PROMPTS, 2, preview="pooled", settings=SETTINGS, batch_size=3)
    assert again.ranks is None and again.pixels == pytest.approx(found.pixels, abs=0.05)
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_preview_that_turns_the_order_round(plain: Any) -> None:
    """The mean of what this decoder shows falls with the mean of the full picture."""
    config = plain.vae.config

    def negative(latents: Tensor) -> Tensor:
        decoded: Tensor = plain.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        return -decoded.clamp(-1, 1)

    found = preview_error(plain, PROMPTS, 4, preview=negative, verifier=brightness, settings=SETTINGS)
    assert found.ranks == pytest.approx([-1.0] * 3)
    constant = preview_error(
        plain, PROMPTS, 2, verifier=lambda images, prompts: torch.zeros(len(images)), settings=SETTINGS
    )
    assert constant.ranks == [None] * 3


def test_an_effort_is_an_error_too(micro_dc: Path) -> None:
    pipe = load_pipeline(str(micro_dc), dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    found = preview_error(pipe, PROMPTS, 1, preview="full", explore={"token_budget": 1}, settings=SETTINGS)
    assert max(found.pixels) > 0 and {"denoise", "explore", "decode"} == set(found.seconds)
    same = preview_error(pipe, PROMPTS, 1, preview="full", explore={"tail_drop": 0.0}, settings=SETTINGS)
    assert same.pixels == [0.0] * 3


def test_bad_arguments(plain: Any) -> None:
    for arguments in ({"prompts": []}, {"samples": 0}, {"samples": 1, "verifier": brightness}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="samples"):
            preview_error(plain, **{"prompts": PROMPTS, "settings": SETTINGS, **arguments})
    with pytest.raises(ValueError, match="preview"):
        preview_error(plain, PROMPTS, preview="small", settings=SETTINGS)
    with pytest.raises(ValueError, match="no such knob"):
        preview_error(plain, PROMPTS, explore={"tail_drop": 0.5}, settings=SETTINGS)
