"""Fused kernels and compiled blocks: one graph in every mode and for every argument, and none that outlives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from long_tail import long_tail
from micro_models import micro_z_transformer
from tiny_flows import QWEN, SD3
from tiny_pipelines import shaken
from torch import Tensor

import fastgen
from fastgen.kernels.dispatch import ran, reset_ran, use_kernels


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def some(*shape: int) -> Tensor:
    """A mask in which every row sees the first."""
    mask = normal(*shape) > -0.5
    mask[..., 0] = True
    return mask


Family = tuple[Callable[[], Any], dict[str, Any], dict[str, dict[str, Any]]]


def dit() -> Any:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=4,
        patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    )  # fmt: skip
    model._repeated_blocks = ["BasicTransformerBlock"]
    return model


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def flux_with_ip_adapter() -> Any:
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = flux()
    model.transformer_blocks[0].attn.set_processor(FluxIPAdapterAttnProcessor(32, 32))
    return model


def sd3(dual: tuple[int, ...] = (0,)) -> Any:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(**SD3, num_layers=2, dual_attention_layers=dual, qk_norm="rms_norm")
    model._repeated_blocks = ["JointTransformerBlock"]
    return model


def sd3_with_ip_adapter() -> Any:
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    model = sd3(())  # diffusers itself breaks the graph of a second attention with arguments for the first
    for block in model.transformer_blocks:
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(32, 32, 16, 32))
    return model


def qwen() -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(**QWEN, num_layers=2)


def z_image() -> Any:
    return micro_z_transformer(n_layers=1, cap_feat_dim=16)


_FLUX_CALL = {
    "hidden_states": normal(1, 16, 4),
    "encoder_hidden_states": normal(1, 8, 32),
    "pooled_projections": normal(1, 32),
    "timestep": torch.tensor([1.0]),
    "img_ids": torch.zeros(16, 3),
    "txt_ids": torch.zeros(8, 3),
}
_SD3_CALL = {
    "hidden_states": normal(1, 4, 8, 8),
    "encoder_hidden_states": normal(1, 5, 32),
    "pooled_projections": normal(1, 32),
    "timestep": torch.tensor([1.0]),
}
_IP = {"ip": {"joint_attention_kwargs": {"ip_hidden_states": [normal(1, 4, 32)]}}}
FAMILIES: dict[str, Family] = {
    "dit": (
        dit,
        {"hidden_states": normal(1, 4, 4, 4), "timestep": torch.tensor([7]), "class_labels": torch.tensor([3])},
        {"plain": {}, "kwargs": {"cross_attention_kwargs": {"temb": None}}},
    ),
    "flux": (
        flux,
        _FLUX_CALL,
        {
            "plain": {},
            "mask": {"joint_attention_kwargs": {"attention_mask": some(1, 1, 24, 24)}},
            "controlnet": {
                "controlnet_block_samples": [normal(1, 16, 32)],
                "controlnet_single_block_samples": [normal(1, 16, 32)],
            },
            **_IP,
        },
    ),
    "flux_with_ip_adapter": (flux_with_ip_adapter, _FLUX_CALL, _IP),
    "sd3": (
        sd3,
        _SD3_CALL,
        {
            "plain": {},
            "mask": {"joint_attention_kwargs": {"attention_mask": some(1, 1, 21, 21)}},
            "controlnet": {"block_controlnet_hidden_states": [normal(1, 16, 32)]},
        },
    ),
    "sd3_with_ip_adapter": (
        sd3_with_ip_adapter,
        _SD3_CALL,
        {"ip": {"joint_attention_kwargs": {"ip_hidden_states": normal(1, 4, 32), "temb": normal(1, 32)}}},
    ),
    "qwen": (
        qwen,
        {
            "hidden_states": normal(1, 16, 16),
            "encoder_hidden_states": normal(1, 5, 32),
            "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.bool),
            "timestep": torch.tensor([0.5]),
            "img_shapes": [[(1, 4, 4)]],
        },
        {
            "plain": {},
            "mask": {"encoder_hidden_states_mask": some(1, 5)},
            "kwargs": {"attention_kwargs": {"attention_mask": None}},
            "controlnet": {"controlnet_block_samples": [normal(1, 16, 32)]},
        },
    ),
    "z_image": (
        z_image,
        {"x": [normal(4, 1, 8, 8)], "t": torch.tensor([0.5]), "cap_feats": [normal(5, 16)]},
        {
            "plain": {},
            "mask": {
                "x": [normal(4, 1, 8, 8), normal(4, 1, 8, 8)],
                "cap_feats": [normal(5, 16), normal(40, 16)],
                "t": torch.tensor([0.5, 0.5]),
            },
        },
    ),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def built(name: str) -> tuple[Any, Callable[..., Tensor]]:
    """A model of a family, and how to call it."""
    build, inputs, _ = FAMILIES[name]
    torch.manual_seed(0)
    model = shaken(build(), 1).eval()

    def call(**extra: Any) -> Tensor:
        # The models change what they are given.
        given = {key: dict(value) if isinstance(value, dict) else value for key, value in (inputs | extra).items()}
        with torch.no_grad():
            sample = model(**given, return_dict=False)[0]
        return torch.stack(sample) if isinstance(sample, list) else sample

    return model, call


FAST = {("sd3", "reference")}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("dit", "auto"),
        *(
            pytest.param(name, mode, marks=() if (name, mode) in FAST else pytest.mark.slow)
            for name in FAMILIES
            for mode in ("reference", "triton")
        ),
    ],
)
def test_enabled_blocks_compile_in_one_graph_for_every_argument(name: str, mode: str) -> None:
    model, call = built(name)
    variants = FAMILIES[name][2]
    wanted = {variant: call(**extra) for variant, extra in variants.items()}
    assert fastgen.enable_kernels(model)["blocks"] > 0
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with use_kernels(mode):
        for variant, extra in variants.items():
            made = call(**extra)
            assert torch.allclose(made, wanted[variant], atol=0 if mode == "reference" else 2e-5, rtol=0), variant


@pytest.mark.parametrize("name", long_tail(["dit", "flux", "sd3", "qwen", "z_image"], fast=("dit",)))
def test_graphs_follow_what_is_enabled_after_compiling(name: str) -> None:
    model, call = built(name)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with use_kernels("triton"):
        stock = call()
        fastgen.enable_kernels(model)
        reset_ran()
        fused = call()
        assert ran()["adaln"] == "triton", "the stock graph ran"
        fastgen.disable_kernels(model)
        reset_ran()
        again = call()
    assert ran() == {}, "the fused graph ran"
    assert torch.equal(again, stock)
    assert not torch.equal(fused, stock) and torch.allclose(fused, stock, atol=2e-5)
