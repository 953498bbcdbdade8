"""The yes/no model: what a batch, a long prompt or an unknown word changes, and what not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from short_recipes import build_recipe

from fastgen.data.captions import vocabulary
from fastgen.models.shapes_verifier import ShapesVerifier
from fastgen.training.verifier import _Supervised

PROMPTS = ["a red circle", "two green stars", "a photo of a heart above a ring", "zebra"]


@pytest.fixture(scope="module")
def model() -> ShapesVerifier:
    torch.manual_seed(0)
    return ShapesVerifier(vocabulary(), width=32, channels=16, depth=1, fusion_layers=2).eval()


@torch.no_grad()
def test_a_pair_does_not_depend_on_the_batch(model: ShapesVerifier) -> None:
    pixels = torch.rand(3, 3, 64, 64) * 2 - 1
    tokens = model.tokens(PROMPTS)
    together = model(pixels, tokens.expand(3, -1, -1))
    assert together.shape == (3, 4) and float(together.std()) > 1e-4
    for i in range(3):
        for k in range(4):
            alone = model(pixels[i : i + 1], tokens[None, k : k + 1])
            assert torch.allclose(alone[0, 0], together[i, k], atol=1e-5)
    words, mask = model.encode_text(tokens[1:2])
    assert torch.allclose(model.answer(words, mask, model.encode_picture(pixels[2:])), together[2, 1], atol=1e-5)


@torch.no_grad()
def test_words(model: ShapesVerifier) -> None:
    tokens = model.tokens(
        ["a red circle", "A red, circle", "a zebra circle", "a yak circle", "a red circle " * 20, ""]
    )
    assert tokens.shape == (6, model.config.longest)
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[2], tokens[3])
    assert not torch.equal(tokens[0], tokens[2]) and bool((tokens[4] != 0).all())
    assert tokens[5, 0] == 1 and bool((tokens[5, 1:] == 0).all())
    # What is padded is not looked at.
    words, mask = model.encode_text(tokens[:1])
    changed = words.clone()
    changed[:, 10:] = 7.0
    picture = model.encode_picture(torch.zeros(1, 3, 64, 64))
    assert torch.allclose(model.answer(words, mask, picture), model.answer(changed, mask, picture), atol=1e-6)


@torch.no_grad()
def test_prompts_of_one_picture_side_by_side(model: ShapesVerifier) -> None:
    """Any number of prompts per picture; a row as long as its words gives what a padded one gives."""
    pixels, tokens = torch.rand(2, 3, 64, 64) * 2 - 1, model.tokens(PROMPTS)
    together = model(pixels, tokens[:, :9].expand(2, -1, -1))
    for k in range(4):
        alone = model(pixels, tokens[k, None].expand(2, 1, -1))[:, 0]
        assert torch.allclose(alone, together[:, k], atol=1e-5)


def test_a_saved_verifier_is_the_same(model: ShapesVerifier, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = ShapesVerifier.from_pretrained(tmp_path).eval()
    pixels, tokens = torch.rand(2, 3, 64, 64), model.tokens(PROMPTS[:2]).expand(2, -1, -1)
    with torch.no_grad():
        assert torch.equal(model(pixels, tokens), loaded(pixels, tokens))


@pytest.mark.slow
def test_the_recipe_learns_and_labels() -> None:
    """Pictures without objects and of two scenes have no true caption; the loss falls on a batch seen often."""
    recipe = build_recipe("verifier", 0)
    generator = torch.Generator().manual_seed(0)
    batch = recipe.batch(0, 24, generator)
    truth = batch["truth"]
    assert truth.shape == (24, 5) and bool((truth[:, 1:4] == 0).all()) and 10 < float(truth[:, 0].sum()) < 24
    assert torch.equal(recipe.batch(0, 24, torch.Generator().manual_seed(0))["tokens"], batch["tokens"])
    pixels = torch.rand(24, 3, 64, 64) * 2 - 1
    spoiled, after, single = recipe._spoil(pixels, truth, generator)  # type: ignore[attr-defined]
    double = (truth[:, 0] == 1) & (after[:, 0] == 0)
    assert bool((double & single).sum() == 0) and bool(single.any())
    assert batch["shapes"].shape == (24, 256) and bool((batch["shapes"] > 0).any())
    assert spoiled.shape == pixels.shape and 0 < int(double.sum()) < 12
    assert bool(((after == truth) | truth.isnan() | double[:, None]).all())
    small = ShapesVerifier(vocabulary(), width=32, channels=16, depth=1, fusion_layers=1, text_layers=1)
    module = _Supervised(small)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss, numbers = recipe.loss(module, batch, torch.Generator().manual_seed(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0] and 0 <= numbers["accuracy"] <= 1
    # Without an object there is nothing to sum over, and still a loss.
    empty = {**batch, "shapes": torch.zeros_like(batch["shapes"])}
    assert bool(recipe.loss(module, empty, generator)[0].isfinite())
