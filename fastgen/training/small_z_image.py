"""Recipe `small`: a deeper Z-Image for 128x128 pictures, grown from the tiny one.

VAE, text encoder and tokenizer of the tiny pipeline are frozen; only the transformer is trained, by flow matching on
ShapesWorld renders of that size. It starts with the same function as the tiny one: every weight is copied, and a new
block is a copy of the block before it with zero gates, which makes it the identity at first.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from torch import Tensor

from fastgen.data.shapes import ShapesWorld
from fastgen.models.z_image_batch import forward_batch, use_real_rotary
from fastgen.training.cards import write_record
from fastgen.training.flow_matching import TokenMetric, encode_latents, flow_matching_batch
from fastgen.training.layout import LayoutHead, patch_labels
from fastgen.training.z_image import GUIDANCE_SCALE, STEPS, captioned, load_z_image, save_pipeline, text_features

SIZE = 128
LAYERS = 8
_PROBE = 5 * LAYERS // 8  # the block whose output the layout loss reads
ROPE_THETA = 1000.0
"""The value of 256, 400, 588, 1000 and 2000 with the smallest velocity error right after growing the tiny model."""
SHIFT = 4.0
"""Of the scheduler, twice that of the tiny pipeline: with four times as many pixels, a picture is visible through
twice the noise."""
HELD_OUT = 128
"""New renders whose latents define the metric."""
_LOGIT_MEAN = 1.9  # likewise: the tiny model's 1.2 plus log 2
_LAYOUT_WEIGHT = 0.5


def source_blocks(old: int, new: int) -> list[tuple[int, bool]]:
    """For each of `new` blocks, its source among the `old` blocks, and whether it is an additional copy.

    Raises:
        ValueError: fewer new blocks than old ones.
    """
    if not 1 <= old <= new:
        raise ValueError(f"n_layers: needs at least the {old} blocks of the trained model, got {new}")
    sources = [index * old // new for index in range(new)]
    return [(source, index > 0 and source == sources[index - 1]) for index, source in enumerate(sources)]


def grow(model: ZImageTransformer2DModel, n_layers: int, rope_theta: float | None = None) -> ZImageTransformer2DModel:
    """A stock transformer of `n_layers` blocks that computes what `model` computes.

    Args:
        model: the trained transformer; not changed.
        n_layers: blocks of the new one, at least those of `model`.
        rope_theta: base of the rotary frequencies, higher for larger pictures; None keeps that of `model`. Another
            value changes the function.

    Raises:
        ValueError: fewer blocks than `model` has.
    """
    sources = source_blocks(model.config.n_layers, n_layers)
    changes = {"n_layers": n_layers, "rope_theta": model.config.rope_theta if rope_theta is None else rope_theta}
    grown: ZImageTransformer2DModel = ZImageTransformer2DModel.from_config({**model.config, **changes})
    parameter = next(model.parameters())
    grown.to(device=parameter.device, dtype=parameter.dtype)
    trained = model.state_dict()
    state = {name: value for name, value in trained.items() if not name.startswith("layers.")}
    for index, (source, closed) in enumerate(sources):
        for name, value in _block(trained, source).items():
            state[f"layers.{index}.{name}"] = _close_gates(value) if closed and "adaLN" in name else value
    grown.load_state_dict(state)
    return grown


def _block(state: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = re.compile(rf"layers\.{index}\.")
    return {name[match.end() :]: value for name, value in state.items() if (match := prefix.match(name))}


def _close_gates(modulation: Tensor) -> Tensor:
    """Set both gates to zero in the weight or bias [4 D, …] of a block's modulation (scale, gate, scale, gate)."""
    closed = modulation.clone()
    for gate in closed.chunk(4)[1::2]:
        gate.zero_()
    return closed


class _Module(torch.nn.Module):
    """The transformer and the head of the layout loss, which reads a middle block's output."""

    adamw_names = ("all_x_embedder", "all_final_layer", "t_embedder", "cap_embedder", "adaLN", "layout")
    compiled_parts = ("",)

    def __init__(self, transformer: ZImageTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.layout = LayoutHead(transformer.dim)

    def forward(
        self, latents: Tensor, timestep: Tensor, captions: Tensor, lengths: Tensor, shapes: Tensor, colors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Velocity [n, C, h, w] and layout loss."""
        output, tokens = forward_batch(self.transformer, latents, timestep, captions, lengths, probe=_PROBE)
        return output, self.layout(tokens, shapes, colors)


class SmallRecipe:
    """Flow matching with caption dropout.

    Args:
        seed: seed of the data.
        pipeline: folder of the trained tiny `ZImagePipeline`.
        init: folder of a grown pipeline to continue from; None grows the tiny one.
    """

    name = "small"

    def __init__(self, seed: int, pipeline: Path, init: Path | None = None) -> None:
        pipe, _ = load_z_image(init or pipeline)
        if init is None:
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=SHIFT)
            pipe.register_modules(transformer=grow(pipe.transformer, LAYERS, ROPE_THETA), scheduler=scheduler)
        self.pipe = pipe
        self.vae = pipe.vae.eval().requires_grad_(False)
        self.text_encoder = pipe.text_encoder.eval().requires_grad_(False)
        self.data = ShapesWorld(seed + 909, size=SIZE)
        images = torch.from_numpy(self.data.batch(HELD_OUT, 10_000_000).images)
        self.metric = TokenMetric(encode_latents(self.vae, images, torch.Generator().manual_seed(seed)))

    def build(self) -> _Module:
        """The transformer and the head of the layout loss."""
        transformer = self.pipe.transformer.train()
        use_real_rotary(transformer)
        transformer.x_pad_token.requires_grad_(False)  # pictures of 256 tokens need no padding token
        return _Module(transformer)

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Latents of renders, the features of their captions (some dropped), and labels of the patches."""
        data = self.data.batch(size, start)
        items, _ = captioned(data, self.pipe.tokenizer, generator)
        return {**items, **patch_labels(data, 8)}

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of the velocity at logit-normal noise levels, plus the layout loss."""
        latents = encode_latents(self.vae, batch["images"], generator)
        noisy, sigma, target = flow_matching_batch(latents, generator, _LOGIT_MEAN)
        lengths = batch["attention_mask"].sum(dim=1)
        labels = (batch["patch_shapes"], batch["patch_colors"])
        output, layout = module(noisy, 1 - sigma, text_features(self.text_encoder, batch), lengths, *labels)
        loss, numbers = self.metric.loss(output, target, sigma)
        numbers["layout"] = float(layout.detach())
        return loss + _LAYOUT_WEIGHT * layout, numbers

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Save the whole pipeline in half precision, loadable by stock diffusers."""
        save_pipeline(
            folder, self.pipe, {"height": SIZE, "width": SIZE, "steps": STEPS, "guidance_scale": GUIDANCE_SCALE}
        )
        write_record(folder, self.name, record)
