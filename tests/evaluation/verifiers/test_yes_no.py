"""P("Yes") on tiny Qwen2.5-VL and Qwen3-VL, against the stock processor and one pair at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_verifiers import PROMPTS, save_clip, save_qwen
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessor

from fastgen.errors import FastgenError
from fastgen.evaluation.verifiers.yes_no import YesNo


@pytest.fixture(scope="module", params=["2.5", "3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen(tmp_path_factory.mktemp("qwen") / request.param, request.param)


def slow_score(folder: Path, image: Tensor, prompt: str) -> float:
    """The model's own processor on one conversation, logits at every place, in float64."""
    processors = pytest.importorskip("transformers.models.qwen2_5_vl.processing_qwen2_5_vl")
    video = pytest.importorskip("transformers.models.qwen2_vl.video_processing_qwen2_vl")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = processors.Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor.from_pretrained(folder), tokenizer, video.Qwen2VLVideoProcessor()
    )
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    text = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        f'Does this figure show "{prompt}"? Please answer Yes or No.<|im_end|>\n<|im_start|>assistant\n'
    )
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.no_grad():
        logits = model(**inputs).logits
    return float(torch.softmax(logits[0, -1], -1)[tokenizer.convert_tokens_to_ids("Yes")])


def test_the_score_is_that_of_the_stock_processor(folder: Path, images: Tensor) -> None:
    verifier = YesNo.load(str(folder), batch_size=4)
    wanted = torch.tensor([slow_score(folder, *pair) for pair in zip(images, PROMPTS, strict=True)])
    assert wanted.log().std() > 0.02
    torch.testing.assert_close(verifier.score(images, PROMPTS), wanted, rtol=1e-3, atol=0)
    assert (verifier.name, verifier.range) == ("qwen-vl", (0.0, 1.0))


def test_a_batch_gives_what_one_by_one_gives(folder: Path, images: Tensor) -> None:
    verifier = YesNo.load(str(folder))
    alone = torch.cat([verifier.score(images[i : i + 1], [PROMPTS[i]]) for i in range(6)])
    torch.testing.assert_close(verifier.score(images, PROMPTS), alone, rtol=1e-4, atol=0)


def test_prompts_are_tokenised_once(folder: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = YesNo.load(str(folder), batch_size=3)
    asked: list[str] = []
    around = verifier._around
    monkeypatch.setattr(verifier, "_around", lambda prompt: asked.append(prompt) or around(prompt))
    for _ in range(3):
        verifier.score(images, PROMPTS)
    assert asked == list(dict.fromkeys(PROMPTS))


def test_a_prompt_with_the_placeholder_is_scored(folder: Path, images: Tensor) -> None:
    found = YesNo.load(str(folder)).score(images[:2], ["a <|image_pad|> ring", "ring"])
    assert torch.isfinite(found).all()


def test_tokenizers_without_template_or_yes_are_refused(folder: Path, tmp_path: Path) -> None:
    made: Any = YesNo.load(str(folder))
    made.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="tokenizer: has no chat template"):
        YesNo(made.model, made.image_processor, made.tokenizer)
    made.tokenizer.save_pretrained(tmp_path)
    clip = save_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match="tokenizer: has no single token for 'Yes'"):
        YesNo(made.model, made.image_processor, AutoTokenizer.from_pretrained(clip))


def test_other_models_are_refused(clip_folder: Path) -> None:
    with pytest.raises(FastgenError, match="verifier qwen-vl: .* is a model of type 'clip', needs one of qwen2_5_vl"):
        YesNo.load(str(clip_folder))
