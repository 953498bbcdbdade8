"""Models with dynamic chunking on the meta device, which has shapes and no values, in place of a GPU: whatever would
stop a GPU raises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.models.dc_dit import DCDiTTransformer2DModel
from fastgen.models.dc_z_image import DCZImageTransformer2DModel
from fastgen.models.packing import Segments

LENGTHS = [5, 1, 9]


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    with torch.no_grad():
        yield torch.device("meta")


def models() -> dict[str, Any]:
    """Made where they are used."""
    with torch.device("meta"):
        dit = DCDiTTransformer2DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=16, num_classes=10, sample_size=8
        )
        z_image = DCZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=24, axes_dims=(4, 6, 6)
        )
    return {"dit": dit, "z-image": z_image}


def test_the_blocks_of_ragged_sequences_ask_nothing(gpu: torch.device) -> None:
    made = models()
    segments = Segments.of(LENGTHS, gpu)
    hidden = torch.randn(sum(LENGTHS), 32, device=gpu)
    conditioning = torch.randn(len(LENGTHS), 32, device=gpu)
    rotary = torch.randn(sum(LENGTHS), 8, 2, device=gpu)
    for block in made["dit"].transformer_blocks:
        hidden = block(hidden, conditioning, segments)
    for block in made["z-image"].layers:
        hidden = block(hidden, rotary, segments, conditioning)
    assert hidden.device.type == "meta"


def forward(model: Any, name: str, **knobs: Any) -> Tensor:
    kind: dict[str, Any] = {"device": next(model.parameters()).device}
    if name == "dit":
        numbers = torch.arange(3, **kind)
        sample: Tensor = model(torch.randn(3, 4, 8, 8, **kind), numbers, class_labels=numbers, **knobs).sample
        return sample
    images = list(torch.randn(3, 4, 1, 8, 8, **kind).unbind(0))
    captions = [torch.randn(length, 24, **kind) for length in LENGTHS]
    stacked: Tensor = torch.stack(list(model(images, torch.rand(3, **kind), captions, **knobs).sample))
    return stacked


@pytest.mark.parametrize("name", ["dit", "z-image"])
def test_a_token_budget_asks_nothing_at_all(gpu: torch.device, name: str) -> None:
    assert forward(models()[name], name, token_budget=7).device.type == "meta"


@pytest.mark.parametrize("name", ["dit", "z-image"])
def test_the_natural_set_asks_once(gpu: torch.device, name: str) -> None:
    """How many tokens it has is known on the device alone: one look, before the blocks."""
    model, seen = models()[name], list[str]()
    blocks = model.transformer_blocks if name == "dit" else model.layers
    blocks[0].register_forward_pre_hook(lambda *arguments: seen.append("block"))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        forward(model, name)
    assert not seen
