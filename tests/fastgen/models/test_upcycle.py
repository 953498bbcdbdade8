"""What `upcycle` refuses: weights that are not plain ones, and sizes out of range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel

import fastgen


@pytest.fixture
def model() -> ZImageTransformer2DModel:
    shape = {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32}
    return ZImageTransformer2DModel(**shape, axes_dims=[4, 6, 6], axes_lens=[160, 16, 16])


def test_lora_layers_are_merged_first(model: ZImageTransformer2DModel) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    before = model.layers[0].attention.to_q.weight.clone()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(ValueError, match="model: has LoRA layers; merge them first"):
        fastgen.upcycle(model)
    model.fuse_lora()
    model.unload_lora()
    merged = fastgen.upcycle(model).layers[0].attention.to_q.weight
    assert torch.equal(merged, model.layers[0].attention.to_q.weight) and not torch.equal(merged, before)


def test_offloaded_weights_are_refused(model: ZImageTransformer2DModel) -> None:
    with pytest.raises(ValueError, match="model: its weights are offloaded"):
        fastgen.upcycle(model.to("meta"))


@pytest.mark.parametrize(
    "scaffold",
    [
        *({"scaffold_dim": value} for value in (0, 1.5, True, "8")),
        *({"scaffold_blocks": value} for value in (-1, 1.5)),
        *({"router": value} for value in (3, "other")),
        *({"router_dim": value} for value in (0, True)),
        {"center_tap": 5},
        {"residual_gate": None},
        *({"smoothing": value} for value in (float("nan"), "1", 0)),
        *({"compression": value} for value in (1, float("inf"), "4")),
        *({"position_scale": value} for value in (0, None)),
        {"nothing": 1},
    ],
    ids=str,
)
def test_wrong_scaffolds_are_refused_by_name(model: ZImageTransformer2DModel, scaffold: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(scaffold))):
        fastgen.upcycle(model, **scaffold)
