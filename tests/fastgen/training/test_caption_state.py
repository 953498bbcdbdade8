"""The auxiliary labels and loss of captions."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen.data.captions import TASKS
from fastgen.data.shapes import COLORS, SHAPES, ShapesWorld
from fastgen.models.tokenizers import build_janus_tokenizer
from fastgen.training.caption_state import FIELDS, CaptionHead, CaptionReader


def _index(values: tuple[str, ...], value: str | None) -> int:
    return 0 if value is None else 1 + values.index(value)


def test_the_last_word_sums_up_what_the_caption_was_made_from() -> None:
    """For all six tasks, from the words alone, under left padding: the renderer's own description."""
    tokenizer = build_janus_tokenizer()
    data = ShapesWorld(5).batch(300)
    ids = tokenizer(data.texts, padding=True, return_tensors="pt").input_ids
    last = CaptionReader(tokenizer).labels(ids)[:, -1]
    assert {caption.tag for caption in data.captions} == set(TASKS)
    for row, caption in zip(last.tolist(), data.captions, strict=True):
        found = dict(zip(FIELDS, row, strict=True))
        objects = caption.spec.objects
        assert found["first_noun"] == _index(SHAPES, objects[0].shape)
        assert found["first_color"] == _index(COLORS, objects[0].color)
        assert found["noun"] == _index(SHAPES, objects[-1].shape)
        assert found["color"] == _index(COLORS, objects[-1].color)
        assert found["relation"] == _index(("left of", "right of", "above", "below"), caption.spec.relation)
        assert found["count"] == (len(objects) - 1 if caption.tag == "counting" else 0)


@pytest.mark.parametrize(
    ("text", "prefixes"),
    [
        ("a red circle", [[0] * 6, [0] * 6, [0] * 6, [1, 1, 1, 1, 0, 0]]),
        ("two stars", [[0] * 6, [0, 0, 0, 0, 0, 1], [4, 0, 4, 0, 0, 1]]),
        ("ring under heart", [[0] * 6, [6, 0, 6, 0, 0, 0], [6, 0, 6, 0, 4, 0], [7, 0, 6, 0, 4, 0]]),
    ],
)
def test_every_prefix_is_described_as_far_as_it_goes(text: str, prefixes: list[list[int]]) -> None:
    tokenizer = build_janus_tokenizer()
    ids = tokenizer([text], return_tensors="pt").input_ids
    assert CaptionReader(tokenizer).labels(ids)[0].tolist() == prefixes


def test_no_words_say_nothing() -> None:
    tokenizer = build_janus_tokenizer()
    labels = CaptionReader(tokenizer).labels(torch.full((2, 5), tokenizer.pad_token_id))
    assert labels.shape == (2, 5, len(FIELDS)) and not labels.any()


def test_the_loss_counts_words_only() -> None:
    """Zero weights give the entropy of uniform guesses; what is behind the mask changes nothing."""
    head = CaptionHead(8)
    hidden, mask = torch.randn(2, 5, 8), torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    labels = torch.randint(5, (2, 5, 6))
    before = head(hidden, labels, mask)
    masked = torch.where(mask[..., None] == 0, 4 - labels, labels)
    assert torch.equal(head(hidden, masked, mask), before)
    assert not torch.equal(head(hidden, 4 - labels, mask), before)
    torch.nn.init.zeros_(head.linear.weight)
    torch.nn.init.zeros_(head.linear.bias)
    uniform = sum(math.log(size) for size in FIELDS.values())
    assert math.isclose(float(head(hidden, labels, mask)), uniform, rel_tol=1e-5)
    assert float(head(hidden, labels, torch.zeros_like(mask))) == 0
