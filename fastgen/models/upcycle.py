"""Upcycling (arXiv 2603.06351): a trained fixed-patch transformer becomes one with dynamic chunking.

The backbone's weights are copied bit for bit; the scaffold (encoder, router, decoder) is new and has to be trained,
see `fastgen.training`. What belongs to the fixed patches alone, the patch embedding and the last projection, is left
behind, unless a Z-Image is upcycled with `grid="patch"`: then the new model begins by keeping every patch and computes
what the original computes.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel, ZImageTransformer2DModel
from torch import nn

from fastgen.checks import check_bool, check_choice, check_integer, check_number
from fastgen.errors import FastgenError
from fastgen.models.dc_dit import DCDiTTransformer2DModel
from fastgen.models.dc_z_image import GRIDS, DCZImageTransformer2DModel
from fastgen.models.patch_grid import PatchChunking
from fastgen.models.routers import ROUTERS
from fastgen.models.scaffold import RESIDUAL_GATES

DCModel = DCDiTTransformer2DModel | DCZImageTransformer2DModel
_NAMES = {"grid": GRIDS, "router": ROUTERS, "residual_gate": RESIDUAL_GATES}
_COUNTS = {"scaffold_dim": 1, "scaffold_blocks": 0, "router_dim": 1, "n_last_layers": 0}


def upcycle(model: nn.Module, **scaffold: Any) -> DCModel:
    """A model with dynamic chunking around the backbone of `model`.

    Args:
        model: a `DiTTransformer2DModel` or a `ZImageTransformer2DModel`; it stays as it is.
        scaffold: configuration of the new parts (`scaffold_dim`, `router`, `residual_gate` …).

    Returns:
        a model in the dtype and on the device of `model`.

    Raises:
        ValueError: another class, a variant that cannot be upcycled, or weights that are not plain ones (LoRA,
            quantisation, offloading).
    """
    if not isinstance(model, nn.Module):
        raise FastgenError(f"model: needs a transformer, got {type(model).__name__}")
    _check_scaffold(scaffold)
    _check_plain(model)
    if isinstance(model, ZImageTransformer2DModel):
        upcycled: DCModel = _z_image(model, scaffold)
    elif isinstance(model, DiTTransformer2DModel):
        upcycled = _dit(model, scaffold)
    else:
        raise ValueError(
            f"model: {type(model).__name__} cannot be upcycled; needs a DiTTransformer2DModel or a "
            "ZImageTransformer2DModel"
        )
    parameter = next(model.parameters())
    return upcycled.to(device=parameter.device, dtype=parameter.dtype)


def _check_scaffold(scaffold: dict[str, Any]) -> None:
    """Refuse values that no scaffold can have; what belongs to another grid is refused by the model's class.

    Raises:
        ValueError: names the argument.
    """
    for name, value in scaffold.items():
        if name in _COUNTS:
            if value is not None:
                check_integer(name, value, _COUNTS[name], 2**16)
        elif name == "compression":
            check_number(name, value, 1, 2**16)
        elif name == "floor":
            check_number(name, value, 0, 1)
        elif name == "smoothing" and value is not None:
            check_number(name, value, above=0, maximum=2**16)
        elif name == "center_tap":
            check_bool(name, value)
        elif name in _NAMES:
            check_choice(name, value, _NAMES[name])


def _check_plain(model: nn.Module) -> None:
    """Refuse weights that cannot be copied as they are.

    Raises:
        ValueError: says what to do first.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise FastgenError(
            "model: has LoRA layers; merge them first (pipe.fuse_lora() and pipe.unload_lora_weights(), or "
            "merge_and_unload() of peft)"
        )
    kinds = {type(parameter).__name__ for parameter in model.parameters() if not parameter.is_floating_point()}
    if kinds or getattr(model, "is_quantized", False):
        raise FastgenError("model: is quantised; load it without quantisation to upcycle it")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise FastgenError("model: its weights are offloaded (on the meta device); load it without offloading")


def _dit(model: DiTTransformer2DModel, scaffold: dict[str, Any]) -> DCDiTTransformer2DModel:
    config = model.config
    embedder = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks[1:]:
        # diffusers gives every block a copy of the one embedding of a DiT.
        other = block.norm1.emb.state_dict()
        if any(not torch.equal(other[name], value) for name, value in embedder.items()):
            raise ValueError("model: its blocks embed timesteps and classes differently; no DiT checkpoint does")
    if not config.attention_bias or config.activation_fn != "gelu-approximate":
        raise ValueError("model: needs attention with biases and gelu-approximate, as every DiT has")
    upcycled = DCDiTTransformer2DModel(
        **{
            "sample_size": config.sample_size,
            "in_channels": config.in_channels,
            "out_channels": config.out_channels or config.in_channels,
            "num_layers": config.num_layers,
            "num_attention_heads": config.num_attention_heads,
            "attention_head_dim": config.attention_head_dim,
            "num_classes": config.num_embeds_ada_norm,
            "norm_eps": config.norm_eps,
            "position_scale": 1 / config.patch_size,
            **scaffold,
        }
    )
    upcycled.embedder.load_state_dict(embedder)
    upcycled.proj_out_1.load_state_dict(model.proj_out_1.state_dict())
    for new, old in zip(upcycled.transformer_blocks, model.transformer_blocks, strict=True):
        new.modulation.load_state_dict(old.norm1.linear.state_dict())
        new.attn1.load_state_dict(old.attn1.state_dict())
        new.ff.load_state_dict(old.ff.state_dict())
    return upcycled


def _z_image(model: ZImageTransformer2DModel, scaffold: dict[str, Any]) -> DCZImageTransformer2DModel:
    config = model.config
    if config.get("siglip_feat_dim") is not None:
        raise ValueError("model: a Z-Image with image conditioning (siglip_feat_dim) cannot be upcycled")
    if tuple(config.all_patch_size) != (2,) or tuple(config.all_f_patch_size) != (1,):
        raise ValueError(f"model: needs patches of 2 x 2 x 1, got {config.all_patch_size}, {config.all_f_patch_size}")
    copied = ["in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "norm_eps", "qk_norm"]
    copied += ["cap_feat_dim", "rope_theta", "t_scale", "axes_dims"]
    upcycled = DCZImageTransformer2DModel(**{**{name: config[name] for name in copied}, **scaffold})
    for name in ("t_embedder", "cap_embedder", "noise_refiner", "context_refiner"):
        getattr(upcycled, name).load_state_dict(getattr(model, name).state_dict())
    for new, old in zip([*upcycled.layers, *upcycled.last_layers], model.layers, strict=True):
        new.load_state_dict(old.state_dict())
    final = model.all_final_layer["2-1"]
    upcycled.adaLN_out.load_state_dict(final.adaLN_modulation.state_dict())
    if isinstance(upcycled.scaffold, PatchChunking):
        upcycled.scaffold.embed.load_state_dict(model.all_x_embedder["2-1"].state_dict())
        upcycled.scaffold.head.load_state_dict(final.linear.state_dict())
    with torch.no_grad():
        upcycled.cap_pad_token.copy_(model.cap_pad_token)
    return upcycled


def backbone_names(model: DCModel) -> list[str]:
    """Names of the parameters that upcycling copied; all others belong to the scaffold."""
    new = ("scaffold.", "time_adaptor.", "text_adaptor.")
    kept = ("scaffold.embed.", "scaffold.head.")  # of grid "patch": the original's own
    return [name for name, _ in model.named_parameters() if name.startswith(kept) or not name.startswith(new)]
