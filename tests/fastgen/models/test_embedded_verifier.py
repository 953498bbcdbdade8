"""The embedded verifier on fresh renders: true captions against ones that are false by one change."""

from __future__ import annotations

import random

import pytest
import torch
from long_tail import long_tail

from fastgen.data import statements
from fastgen.data.captions import TASKS, caption_of
from fastgen.data.shapes import ShapesWorld
from fastgen.evaluation.verifiers.names import load_verifier

CHANGES = {
    "counting": statements._other_number,
    "position": statements._other_place,
    "color_attr": statements._swapped_colors,
}


@pytest.mark.parametrize("kind", long_tail(["shape", "color", *CHANGES], fast=("shape", "position")))
def test_it_distinguishes_true_captions_from_false_ones(kind: str) -> None:
    """Right in at least 96 of 100 and more pairs: one that guesses is so with a chance below 1e-20."""
    rng, pairs, start = random.Random(0), list[tuple[torch.Tensor, str, str]](), 0
    change = {"shape": statements._other_shape, "color": statements._other_color, **CHANGES}[kind]
    while len(pairs) < 100:
        batch = ShapesWorld(98_765, held_out=False).batch(100, start)
        start += 100
        for image, caption, scene in zip(batch.images, batch.captions, batch.scenes, strict=True):
            if kind in TASKS and caption.tag != kind:
                continue
            wrong = change(caption, rng)
            known = wrong is not None and (
                statements.is_true(wrong, scene) is False
                or (wrong.spec.relation is not None and statements._moved(caption, wrong))
            )
            if known and wrong is not None:
                text = caption_of(caption.tag, caption.spec, rng).text
                pairs.append((torch.from_numpy(image).permute(2, 0, 1), text, wrong.text))
    images = torch.stack([image for image, _, _ in pairs])
    verifier = load_verifier("shapes-verifier")
    yes = verifier.score(images, [text for _, text, _ in pairs])
    no = verifier.score(images, [text for _, _, text in pairs])
    assert float((yes > no).float().mean()) >= 0.96
    assert float((yes > 0.5).float().mean()) >= 0.96 and float((no < 0.5).float().mean()) >= 0.96
