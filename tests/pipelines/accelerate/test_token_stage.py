"""The tokens of GLM-Image in windows: those of the stock loop, in fewer passes of the language model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from long_tail import long_tail
from PIL import Image
from tiny_glm_image import language_model, tiny_whole_glm_image
from transformers import GlmImageForConditionalGeneration

import fastgen
from fastgen.accounting import Stats, account
from fastgen.drafters.targets import target_of
from fastgen.errors import FastgenError
from fastgen.pipelines.accelerate.parts import TokenStage

PROMPTS = ["a red ring", "ring"]


@pytest.fixture(scope="module")
def whole() -> Any:
    return tiny_whole_glm_image()


@pytest.fixture
def pipe(whole: Any) -> Any:
    return copy.deepcopy(whole)


def prompts(pipe: Any, texts: list[str], images: list[Any] | None = None) -> dict[str, Any]:
    content = [[{"type": "image", "image": images[i]}] if images else [] for i in range(len(texts))]
    messages = [
        [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]
        for text, shown in zip(texts, content, strict=True)
    ]
    made = pipe.processor.apply_chat_template(
        messages, tokenize=True, padding=True, target_h=96, target_w=64, return_dict=True, return_tensors="pt"
    )
    return dict(made)


def picture(side: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def tokens_of(pipe: Any, inputs: dict[str, Any], count: int, **given: Any) -> tuple[torch.Tensor, Stats]:
    torch.manual_seed(1)
    with account() as stats:
        drawn = pipe.vision_language_encoder.generate(**inputs, max_new_tokens=count, **given)
    return torch.cat([drawn, torch.randint(1 << 20, (len(drawn), 1))], dim=1), stats  # and what randomness is left


LAWS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 0, "top_p": 1.0},
    "restricted": {"do_sample": True, "temperature": 0.8, "top_k": 12, "top_p": 0.7},
    "ended": {"do_sample": True, "top_k": 0, "eos_token_id": list(range(4))},
}


def test_a_pipeline_saved_with_the_windows_on_is_the_stock_one(pipe: Any, tmp_path: Path) -> None:
    inputs = prompts(pipe, PROMPTS)
    stock, _ = tokens_of(pipe, inputs, 12, **LAWS["sampled"])
    with fastgen.accelerated(pipe, plan=[TokenStage(5)]):
        pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert type(loaded.vision_language_encoder) is GlmImageForConditionalGeneration
    again, _ = tokens_of(loaded, inputs, 12, **LAWS["sampled"])
    assert torch.equal(again, stock)
    with fastgen.accelerated(loaded, plan=[TokenStage(5)]):
        ours, _ = tokens_of(loaded, inputs, 12, **LAWS["sampled"])
    assert torch.equal(ours, stock)


WAYS = [(law, window, shown) for law in LAWS for window in (1, 5, 12) for shown in (False, True)]


@pytest.mark.parametrize(
    ("law", "window", "shown"), long_tail(WAYS, fast=[way for way in WAYS if (way[1] == 5) == way[2]], unpack=True)
)
def test_tokens_are_those_of_stock_generate(pipe: Any, law: str, window: int, shown: bool) -> None:
    """Rows of unequal length; the generator is left in the same state."""
    inputs = prompts(pipe, PROMPTS, [picture(64), picture(64)] if shown else None)
    count = 7 if shown else 40
    stock, _ = tokens_of(pipe, inputs, count, **LAWS[law])
    assert torch.equal(tokens_of(pipe, inputs, count, **LAWS[law])[0], stock), "stock is a function of the seed"
    with fastgen.accelerated(pipe, plan=[TokenStage(window)]):
        ours, stats = tokens_of(pipe, inputs, count, **LAWS[law])
    assert stats.passes["target"] > 0 and stats.paths["token stage"] == {"windows": None}
    end = -1 if law == "ended" else None  # of rows that all end early the stock loop draws fewer numbers
    assert torch.equal(ours[:, :end], stock[:, :end])


def test_fewer_passes_than_tokens_where_the_model_repeats_itself(pipe: Any) -> None:
    """A random model: passes, not speed."""
    inputs = prompts(pipe, PROMPTS[:1])
    with fastgen.accelerated(pipe):
        _, stats = tokens_of(pipe, inputs, 150, do_sample=True, temperature=0.3)
    assert stats.passes["target"] < 0.8 * 150


def test_the_pipeline_draws_the_same_picture_and_is_itself_again(pipe: Any) -> None:
    model = pipe.vision_language_encoder
    stock = type(model)

    def draw(which: Any) -> torch.Tensor:
        settings = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt"}
        images: torch.Tensor = which(PROMPTS, generator=torch.Generator().manual_seed(3), **settings).images
        return images

    expected = draw(pipe)
    plan = fastgen.accelerate(pipe)
    assert "token_stage" in [part.name for part in plan.parts] and plan.loss == "exact"
    with account() as stats:
        assert torch.allclose(draw(pipe), expected, atol=1e-4)
    assert stats.passes["target"] > 0
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is stock, "a copy is a plain one"
    fastgen.restore(pipe)
    assert type(model) is stock and torch.allclose(draw(pipe), expected, atol=1e-6)


UNSERVED: dict[str, dict[str, Any]] = {
    "num_beams is given": {"num_beams": 2},
    "RepetitionPenaltyLogitsProcessor looks at more": {"repetition_penalty": 1.3},
    "more than tokens is asked for": {"return_dict_in_generate": True},
    "MaxTimeCriteria looks at more": {"max_time": 100.0},
}


@pytest.mark.parametrize("reason", UNSERVED)
def test_what_windows_cannot_do_the_stock_loop_does_and_says_why(pipe: Any, reason: str) -> None:
    inputs = prompts(pipe, PROMPTS[:1])

    def draw() -> torch.Tensor:
        torch.manual_seed(1)
        drawn: Any = pipe.vision_language_encoder.generate(**inputs, max_new_tokens=6, **UNSERVED[reason])
        tokens: torch.Tensor = getattr(drawn, "sequences", drawn)
        return tokens

    expected = draw()
    with fastgen.accelerated(pipe), account() as stats:
        assert torch.equal(draw(), expected)
    [(used, why)] = stats.paths["token stage"].items()
    assert used == "stock" and str(why).startswith(reason) and not stats.passes.get("target")


def test_other_pipelines_have_no_token_stage_and_the_model_alone_is_no_target(pipe: Any) -> None:
    from stock_families import family

    with pytest.raises(FastgenError, match="it draws no tokens"):
        fastgen.accelerate(family("flux"), plan=[TokenStage()])
    with pytest.raises(FastgenError, match="GlmImagePipeline.*accelerate"):
        target_of(language_model(), pipe.processor)
    with pytest.raises(FastgenError, match="window: 0"):
        TokenStage(0)
