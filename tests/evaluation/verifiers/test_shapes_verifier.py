"""The ShapesWorld verifier behind the protocol of verifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen.data.captions import vocabulary
from fastgen.errors import FastgenError
from fastgen.evaluation.verifiers.names import load_verifier
from fastgen.models.shapes_verifier import ShapesVerifier

PROMPTS = ["a red circle", "two green stars", "a red circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("verifier")
    ShapesVerifier(vocabulary(), width=32, channels=16, depth=1, fusion_layers=2).save_pretrained(place)
    return place


def test_scores_are_probabilities_of_the_network(folder: Path) -> None:
    verifier = load_verifier(f"shapes-verifier:{folder}", batch_size=2)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    scores = verifier.score(images, PROMPTS)
    network = ShapesVerifier.from_pretrained(folder).eval()
    with torch.no_grad():
        pixels = images.float() / 127.5 - 1
        expected = network(pixels, network.tokens(PROMPTS)[:, None]).sigmoid()[:, 0]
    assert torch.allclose(scores, expected, atol=1e-5) and verifier.range == (0.0, 1.0)
    large = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.allclose(verifier.score(large, PROMPTS), scores, atol=1e-5)


def test_a_prompt_is_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier: Any = load_verifier(f"shapes-verifier:{folder}")
    counted = []
    encode = verifier.model.encode_text
    monkeypatch.setattr(verifier.model, "encode_text", lambda tokens: counted.append(len(tokens)) or encode(tokens))
    for _ in range(3):
        verifier.score(torch.zeros(3, 3, 64, 64, dtype=torch.uint8), PROMPTS)
    assert counted == [2]


def test_a_missing_or_half_checkpoint_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FastgenError, match=r"has no config\.json"):
        load_verifier(f"shapes-verifier:{tmp_path}")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(FastgenError, match="cannot be loaded"):
        load_verifier(f"shapes-verifier:{tmp_path}")
