"""The embedded models' classes, tokenizers and sizes."""

from __future__ import annotations

import pytest
import torch

from fastgen.data.captions import evaluation_prompts, vocabulary
from fastgen.models.tiny_janus import build_janus, build_processor
from fastgen.models.tiny_z_image import build_pipeline
from fastgen.models.tokenizers import build_janus_tokenizer, build_text_tokenizer


@pytest.mark.parametrize("build", [build_text_tokenizer, build_janus_tokenizer])
def test_every_prompt_is_known_and_survives_a_round_trip(build: object) -> None:
    tokenizer = build()  # type: ignore[operator]
    for item in evaluation_prompts():
        ids = tokenizer(item["prompt"]).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == item["prompt"]
    assert tokenizer.unk_token_id in tokenizer("a mauve circle").input_ids
    assert tokenizer("A Red CIRCLE, please").input_ids[-3:] != tokenizer("a red circle").input_ids[-3:]
    assert len(set(tokenizer.convert_tokens_to_ids(list(vocabulary())))) == len(vocabulary())


def test_chat_template_marks_the_prompt() -> None:
    tokenizer = build_text_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a red circle"}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    assert tokens == ["<|im_start|>", "a", "red", "circle", "<|im_end|>", "<|assistant|>"]


def test_janus_prompts_are_padded_on_the_left_and_end_with_begin_of_image() -> None:
    processor = build_processor()
    inputs = processor(
        text=["a circle", "a red circle left of a star"], generation_mode="image", padding=True, return_tensors="pt"
    )
    tokenizer = processor.tokenizer
    assert (inputs.input_ids[:, -1] == tokenizer.convert_tokens_to_ids("<begin_of_image>")).all()
    assert inputs.input_ids[0, 0] == tokenizer.pad_token_id and inputs.attention_mask[0, 0] == 0
    assert inputs.input_ids[1, 0] == tokenizer.bos_token_id


def test_sizes_are_those_of_the_specification() -> None:
    pipe = build_pipeline()
    size = sum(p.numel() for p in pipe.transformer.parameters())
    assert 3e6 < size < 5e6
    assert pipe.vae_scale_factor == 4 and pipe.vae.config.latent_channels == 16
    janus = build_janus().model
    llama = sum(p.numel() for p in janus.language_model.parameters())
    assert 3e6 < llama < 6e6
    assert janus.vqmodel.config.num_embeddings == 512
    assert janus.vision_model.config.num_image_tokens == 256


def test_building_leaves_the_global_random_state_alone_and_is_seeded() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, third = build_pipeline(1), build_pipeline(1), build_pipeline(2)
    torch.testing.assert_close(torch.rand(3), expected)
    weights = [pipe.transformer.layers[0].feed_forward.w1.weight for pipe in (first, second, third)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
