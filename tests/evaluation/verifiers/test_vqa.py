"""VQAScore on a tiny CLIP-FlanT5, against a slow computation of one pair at a time in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_verifiers import PROMPTS, VISION, save_clip_flan_t5
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from fastgen.errors import FastgenError
from fastgen.evaluation.verifiers.pixels import pad_to_square
from fastgen.evaluation.verifiers.vqa import VQAScore

# Written out once more: a slip in the constants must not go unnoticed.
BEFORE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: "
)


def slow_score(folder: Path, image: Tensor, prompt: str) -> float:
    """Networks built by hand from the checkpoint's tensors; explicit concatenation, layers and cross-entropy."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.bin"):
        tensors |= torch.load(file)
    tensors = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    settings = json.loads((folder / "config.json").read_text())
    known = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj")
    t5 = T5ForConditionalGeneration(
        T5Config(**{name: settings[name] for name in known}, tie_word_embeddings=False, decoder_start_token_id=0)
    ).double()
    t5.lm_head.weight = torch.nn.Parameter(tensors["lm_head.weight"])
    t5.load_state_dict({name: tensors[name] for name in t5.state_dict()})
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION)).double()
    own = "vision_tower.vision_tower.vision_model."
    tower.load_state_dict({name: tensors[own + name.removeprefix("vision_model.")] for name in tower.state_dict()})
    t5.eval()
    tower.eval()
    body: Any = getattr(tower, "vision_model", tower)
    tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")

    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    side = max(picture.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))  # int(255 * CLIP's mean)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    processor = CLIPImageProcessor.from_pretrained(folder / "vision_tower")
    with torch.no_grad():
        hidden = body.pre_layrnorm(body.embeddings(processor(square, return_tensors="pt")["pixel_values"].double()))
        for layer in body.encoder.layers[:-1]:
            hidden = layer(hidden, None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        hidden = hidden[0, 1:]
        assert hidden.shape == (16, 16)
        hidden = hidden @ tensors["mm_projector.0.weight"].T + tensors["mm_projector.0.bias"]
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        hidden = hidden @ tensors["mm_projector.2.weight"].T + tensors["mm_projector.2.bias"]
        after = f'\nDoes this figure show "{prompt}"? Please answer yes or no. ASSISTANT: '
        before_ids, after_ids = tokenizer(BEFORE).input_ids, tokenizer(after).input_ids
        assert before_ids[-1] == after_ids[-1] == tokenizer.eos_token_id
        inputs = torch.cat([tensors["shared.weight"][before_ids], hidden, tensors["shared.weight"][after_ids]])
        states = t5.encoder(inputs_embeds=inputs[None]).last_hidden_state
        answer = tokenizer("Yes").input_ids
        assert len(answer) == 2 and answer[1] == tokenizer.eos_token_id
        start = torch.tensor([[0, answer[0]]])
        out = t5.decoder(input_ids=start, encoder_hidden_states=states).last_hidden_state
        logits = (out @ tensors["lm_head.weight"].T)[0, :, : len(tokenizer)]  # FlanT5 does not scale its outputs
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
    return float(torch.exp(-loss))


@pytest.fixture(scope="module")
def wanted(vqa_folder: Path) -> Tensor:
    coarse = torch.randint(0, 256, (6, 3, 5, 7), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    pictures = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)
    return torch.tensor([slow_score(vqa_folder, *pair) for pair in zip(pictures, PROMPTS, strict=True)])


@pytest.mark.parametrize("batch_size", [6, 4, 1])
def test_the_score_is_that_of_a_slow_computation(
    vqa_folder: Path, images: Tensor, wanted: Tensor, batch_size: int
) -> None:
    verifier = VQAScore.load(str(vqa_folder), batch_size=batch_size)
    found = verifier.score(images, PROMPTS)
    assert wanted.log().std() > 0.05
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    assert (verifier.name, verifier.range) == ("vqa-score", (0.0, 1.0))


def test_the_picture_and_the_prompt_both_count(vqa_folder: Path, images: Tensor) -> None:
    verifier = VQAScore.load(str(vqa_folder))
    pictures = verifier.score(images, ["ring"] * 6).log()
    prompts = verifier.score(images[:1].expand(4, -1, -1, -1), list(dict.fromkeys(PROMPTS))).log()
    assert pictures.std() > 1e-2 and prompts.std() > 1e-2


def test_prompts_are_tokenised_once(vqa_folder: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = VQAScore.load(str(vqa_folder), batch_size=3)
    texts: list[str] = []
    tokens = verifier._tokens
    monkeypatch.setattr(verifier, "_tokens", lambda text: texts.append(text) or tokens(text))
    for _ in range(3):
        verifier.score(images, PROMPTS)
    assert len(texts) == len(set(PROMPTS))


def test_a_long_prompt_is_cut(vqa_folder: Path, images: Tensor) -> None:
    verifier = VQAScore.load(str(vqa_folder))
    long = "a" * 3000
    (tokens,) = verifier._encode([long])
    assert len(tokens) + 1 + len(verifier._before) == 2048
    assert 0 < verifier.score(images[:1], [long]).item() <= 1


def test_all_layouts_of_a_checkpoint_give_the_same(images: Tensor, wanted: Tensor, tmp_path: Path) -> None:
    one_file = save_clip_flan_t5(tmp_path / "one", shards=False)
    without = save_clip_flan_t5(tmp_path / "without", with_tower=False)
    for folder in (one_file, without):
        torch.testing.assert_close(VQAScore.load(str(folder)).score(images, PROMPTS), wanted, rtol=1e-4, atol=0)


def test_bfloat16_weights(vqa_folder: Path, images: Tensor, wanted: Tensor) -> None:
    verifier = VQAScore.load(str(vqa_folder), dtype="bfloat16")
    assert {parameter.dtype for parameter in verifier.model.parameters()} == {torch.bfloat16}
    found = verifier.score(images, PROMPTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.log(), wanted.log(), atol=0.3, rtol=0)


def test_padding_to_a_square() -> None:
    wide = torch.full((2, 3, 3, 6), 9, dtype=torch.uint8)
    square = pad_to_square(wide, (0.5, 0.25, 1.0))
    assert square.shape == (2, 3, 6, 6)
    assert (square[:, :, 1:4] == 9).all()
    assert square[0, :, 0, 0].tolist() == [127, 63, 255] == square[1, :, 5, 5].tolist()
    tall = pad_to_square(wide.transpose(2, 3), (0.0, 0.0, 0.0))
    assert (tall[..., 1:4] == 9).all() and (tall[..., [0, 4, 5]] == 0).all()
    assert pad_to_square(square, (0.0, 0.0, 0.0)) is square


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_checkpoints_of_another_kind_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_clip_flan_t5(tmp_path / "vqa", shards=False)
    edit(folder, mm_projector_type="linear")
    with pytest.raises(FastgenError, match="has projector 'linear' on 'patch' features, only 'mlp2x_gelu'"):
        VQAScore.load(str(folder))
    edit(folder, mm_projector_type="mlp2x_gelu")
    tensors = load_file(folder / "model.safetensors")
    few = {name: tensor for name, tensor in tensors.items() if "mm_projector" not in name}
    save_file(few, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FastgenError, match="verifier vqa-score: .*no projector of two layers among the weights"):
        VQAScore.load(str(folder))
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FastgenError, match="lacks 1 weights, the first is 'encoder.block.1"):
        VQAScore.load(str(folder))
