"""Models whose weights are elsewhere outside their own module's forward, and models in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from long_tail import long_tail
from micro_models import awake
from torch import Tensor, nn

from fastgen.drafters.cache import KVCache
from fastgen.drafters.eagle import EagleDrafter
from fastgen.drafters.medusa import MedusaDrafter
from fastgen.models.dc_dit import DCDiTTransformer2DModel
from fastgen.models.dc_z_image import DCZImageTransformer2DModel
from fastgen.models.llamagen import LlamaGenTransformer
from fastgen.models.shapes_detector import ShapesDetector
from fastgen.models.shapes_verifier import ShapesVerifier


def dit(**config: Any) -> nn.Module:
    shape = {"num_classes": 5, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    return awake(DCDiTTransformer2DModel(**{**shape, **config}))


def call_dit(model: Any, dtype: torch.dtype) -> Tensor:
    latents = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    return model(latents, torch.tensor([5, 9]), torch.tensor([1, 2]), tail_drop=0.3).sample


def z_image(**config: Any) -> nn.Module:
    shape = {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 32}
    return awake(DCZImageTransformer2DModel(**shape, axes_dims=(4, 6, 6), **config))


def call_z_image(model: Any, dtype: torch.dtype) -> Tensor:
    latents = torch.randn(2, 4, 1, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    captions = [torch.ones(5, 32, dtype=dtype), torch.ones(7, 32, dtype=dtype)]
    return torch.stack(model(list(latents), torch.tensor([0.5, 0.2], dtype=dtype), captions, return_dict=False)[0])


def call_patch_grid(model: Any, dtype: torch.dtype) -> Tensor:
    latents = torch.randn(2, 4, 1, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    captions = [torch.ones(5, 32, dtype=dtype), torch.ones(7, 32, dtype=dtype)]
    knobs = {"tail_drop": 0.4, "return_dict": False}
    return torch.stack(model(list(latents), torch.tensor([0.5, 0.2], dtype=dtype), captions, **knobs)[0])


def llamagen() -> nn.Module:
    shape = {"vocab_size": 32, "dim": 32, "n_layers": 2, "n_heads": 2, "grid": 4, "multiple_of": 16}
    return LlamaGenTransformer(**shape, caption_dim=16, caption_tokens=5)


def call_llamagen(model: Any, dtype: torch.dtype) -> Tensor:
    condition = torch.cat([model.embed_caption(torch.ones(1, 5, 16, dtype=dtype)), model.embed_caption(None)])
    return model(condition, torch.zeros(2, 3, dtype=torch.long))


def call_eagle(model: Any, dtype: torch.dtype) -> Tensor:
    mask = torch.ones(1, 3, dtype=torch.bool)
    cache = KVCache.allocate(1, mask, 4, 4, model.head_dim, dtype)
    features = torch.ones(1, 3, 16 * max(1, len(model.taps)), dtype=dtype)
    place = torch.arange(3)[None]
    hidden = model.layer(torch.ones(1, 3, 16, dtype=dtype), model.read(features), place, cache, place,
                         torch.ones(1, 1, 3, 3, dtype=torch.bool))  # fmt: skip
    return model.head(model.norm_out(hidden)) if model.config.variant == 3 else hidden


def call_medusa(model: Any, dtype: torch.dtype) -> Tensor:
    return model.guess(torch.ones(1, 2, 16, dtype=dtype), torch.ones(1, 2, 16, dtype=dtype), 1)


SIZES = {"hidden_size": 16, "vocab_size": 20, "target_layers": 4}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, torch.dtype], Tensor]]] = {
    "dit": (dit, call_dit),
    "dit-cosine": (lambda: dit(router="cosine", residual_gate="mask"), call_dit),
    "z-image": (z_image, call_z_image),
    "patch-grid": (lambda: z_image(grid="patch", n_last_layers=1), call_patch_grid),
    "llamagen": (llamagen, call_llamagen),
    "eagle-1": (lambda: EagleDrafter(**SIZES, width=32), call_eagle),
    "eagle-3": (lambda: EagleDrafter(**SIZES, variant=3), call_eagle),
    "medusa": (lambda: MedusaDrafter(**SIZES), call_medusa),
    "detector": (
        lambda: ShapesDetector(("circle",), ("red",), width=16, depth=1, feature_dim=16),
        lambda model, dtype: model(torch.ones(1, 3, 16, 16, dtype=dtype)).mask,
    ),
    "verifier": (
        lambda: ShapesVerifier(("red", "circle"), width=16, channels=16, depth=1, fusion_layers=1, grid=4),
        lambda model, dtype: model(torch.ones(1, 3, 16, 16, dtype=dtype), torch.tensor([[[2, 3, 4]]])),
    ),
}
OFFLOADED = [name for name in MODELS if name not in ("detector", "verifier")]


def made(name: str) -> tuple[nn.Module, Callable[[Any, torch.dtype], Tensor]]:
    torch.manual_seed(0)
    build, call = MODELS[name]
    return build().eval(), call


class Taken:
    """Weights are NaN except during their own module's forward, as with hooks that swap `parameter.data`."""

    def __init__(self, model: nn.Module) -> None:
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if own:
                kept = [parameter.data for parameter in own]
                module.register_forward_pre_hook(lambda *_, own=own, kept=kept: self._put(own, kept))
                module.register_forward_hook(lambda *_, own=own: self._take(own))
                self._take(own)

    @staticmethod
    def _put(own: list[nn.Parameter], kept: list[Tensor]) -> None:
        for parameter, data in zip(own, kept, strict=True):
            parameter.data = data

    @staticmethod
    def _take(own: list[nn.Parameter]) -> None:
        for parameter in own:
            parameter.data = torch.full_like(parameter.data, torch.nan)


@pytest.mark.parametrize("how", ["meta", "swapped", "leaf_level", "block_level"])
@pytest.mark.parametrize("name", OFFLOADED)
@torch.no_grad()
def test_weights_are_read_only_inside_their_own_forward(name: str, how: str) -> None:
    model, call = made(name)
    expected, moved = call(model, torch.float32), copy.deepcopy(model)
    if how == "meta":
        accelerate.cpu_offload(moved, torch.device("cpu"), offload_buffers=False)
        assert all(parameter.is_meta for parameter in moved.parameters())
    elif how == "swapped":
        Taken(moved)
    else:
        cpu = torch.device("cpu")
        blocks = {"num_blocks_per_group": 1} if how == "block_level" else {}
        moved.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=how, **blocks)
    assert torch.equal(call(moved, torch.float32), expected)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models_run_in_float64(name: str) -> None:
    model, call = made(name)
    expected = call(model, torch.float32)
    assert torch.allclose(call(model.double(), torch.float64).float(), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", long_tail(["dit", "z-image", "patch-grid"], fast=("dit",)))
@torch.no_grad()
def test_a_token_budget_compiles_to_one_graph(name: str) -> None:
    model, _ = made(name)
    if name == "dit":
        arguments: Any = (torch.randn(2, 4, 4, 4), torch.tensor([5, 6]), torch.tensor([1, 2]))
    else:
        arguments = ([torch.randn(4, 1, 4, 4)] * 2, torch.tensor([0.5, 0.2]), [torch.ones(5, 32), torch.ones(7, 32)])
    budget = 3 if name == "patch-grid" else 7  # a sample has 4 patches, or 16 positions
    expected = model(*arguments, token_budget=budget, return_dict=False)[0]
    # Whether there is one graph is decided before a backend sees it.
    compiled = torch.compile(model, fullgraph=True, backend="eager" if name == "dit" else "aot_eager")
    actual = compiled(*arguments, token_budget=budget, return_dict=False)[0]
    for one, other in zip(actual, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
