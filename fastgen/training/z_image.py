"""Recipe `z-image`: transformer and text encoder of the tiny `ZImagePipeline`, by flow matching on ShapesWorld."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.data.shapes import ShapesBatch, ShapesWorld
from fastgen.errors import FastgenError
from fastgen.models.tiny_z_image import build_pipeline
from fastgen.models.tokenizers import build_text_tokenizer
from fastgen.models.z_image_batch import forward_batch, use_real_rotary
from fastgen.pipelines.loading import load_checkpoint
from fastgen.pipelines.loading.checkpoint import find_checkpoint
from fastgen.pretrained import load_pretrained
from fastgen.training.cards import inherit_records, write_defaults, write_record
from fastgen.training.flow_matching import TokenMetric, encode_latents, flow_matching_batch
from fastgen.training.layout import LayoutHead, patch_labels

STEPS = 12
GUIDANCE_SCALE = 2.0
"""Defaults of `fastgen generate` with this model; `ZImagePipeline` computes cond + scale * (cond - uncond)."""

_CAPTION_DROPOUT = 0.1
_LAYOUT_WEIGHT = 0.5
_PROBE = 2  # the layout head reads the third of five blocks


def captioned(data: ShapesBatch, tokenizer: Any, generator: torch.Generator) -> tuple[dict[str, Any], Tensor]:
    """Renders with tokenised captions, one in ten dropped, and which are dropped, bool [n].

    The prompts are formatted as in `ZImagePipeline`, but padded to 32 tokens.
    """
    dropped = torch.rand(len(data.texts), generator=generator) < _CAPTION_DROPOUT
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "" if drop else text}], tokenize=False, add_generation_prompt=True
        )
        for drop, text in zip(dropped.tolist(), data.texts, strict=True)
    ]
    # One length for every batch (captions have at most 17 tokens): no recompilation.
    tokens = tokenizer(texts, padding=True, pad_to_multiple_of=32, return_tensors="pt")
    ids, mask = tokens.input_ids, tokens.attention_mask
    return {"images": torch.from_numpy(data.images), "input_ids": ids, "attention_mask": mask}, dropped


class ZImageModule(torch.nn.Module):
    """The trained modules: the transformer and the text encoder, jointly."""

    # AdamW trains input and output projections and the modulation; Muon trains the blocks' matrices.
    adamw_names = ("all_x_embedder", "all_final_layer", "t_embedder", "cap_embedder", "adaLN_modulation", "layout")
    compiled_parts = ("",)

    def __init__(self, transformer: torch.nn.Module, text_encoder: torch.nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.layout = LayoutHead(transformer.dim)  # type: ignore[arg-type]

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        shapes: torch.Tensor,
        colors: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Estimate of data - noise for noisy latents [n, C, h, w] given token ids [n, L], and the layout loss."""
        hidden = self.text_encoder(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        lengths = attention_mask.sum(dim=1)
        output, tokens = forward_batch(
            self.transformer, latents, timestep, hidden.hidden_states[-2], lengths, probe=_PROBE
        )
        return output, self.layout(tokens, shapes, colors)


class ZImageRecipe:
    """Flow matching with caption dropout.

    Args:
        seed: seed of weights and data.
        vae: folder of a trained VAE (recipe `vae`); `None` takes the VAE of `init`.
        init: folder of a pipeline to continue from; `None` starts from random weights.
    """

    name = "z-image"

    def __init__(self, seed: int, vae: Path | None, init: Path | None = None) -> None:
        from diffusers import AutoencoderKL

        self.parts = [part for part in (init and init / "transformer", vae) if part is not None]
        if init is None:
            self.pipe = build_pipeline(seed)
        else:
            self.pipe, _ = load_z_image(init)
        if vae is not None:
            self.pipe.register_modules(vae=load_pretrained(AutoencoderKL, vae))
        self.vae = self.pipe.vae.eval().requires_grad_(False)
        self.data = ShapesWorld(seed + 303)
        images = torch.from_numpy(self.data.batch(256, 10_000_000).images)
        self.metric = TokenMetric(encode_latents(self.vae, images, torch.Generator().manual_seed(seed)))

    def build(self) -> ZImageModule:
        """Transformer and text encoder; the VAE stays frozen."""
        use_real_rotary(self.pipe.transformer)
        # Unused: the pipeline reads the encoder's second-to-last hidden state, and pictures of 64 tokens need no
        # padding token.
        encoder = self.pipe.text_encoder
        for unused in (encoder.layers[-1], encoder.norm):
            unused.requires_grad_(False)
        self.pipe.transformer.x_pad_token.requires_grad_(False)
        return ZImageModule(self.pipe.transformer.train(), self.pipe.text_encoder.train())

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Renders and their tokenised captions, some dropped."""
        data = self.data.batch(size, start)
        items, _ = captioned(data, self.pipe.tokenizer, generator)
        return {**items, **patch_labels(data, 8)}

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean squared error of the velocity at logit-normal noise levels, plus the layout loss."""
        latents = encode_latents(self.vae, batch["images"], generator)
        noisy, sigma, target = flow_matching_batch(latents, generator)
        output, layout = module(
            noisy,
            1 - sigma,
            batch["input_ids"],
            batch["attention_mask"],
            batch["patch_shapes"],
            batch["patch_colors"],
        )
        loss, numbers = self.metric.loss(output, target, sigma)
        numbers["layout"] = float(layout.detach())
        return loss + _LAYOUT_WEIGHT * layout, numbers

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Save the whole pipeline in half precision, loadable by stock diffusers."""
        save_pipeline(folder, self.pipe, {"height": 64, "width": 64, "steps": STEPS, "guidance_scale": GUIDANCE_SCALE})
        for part in self.parts:
            inherit_records(folder, part)
        write_record(folder, "z-image", record)


def load_z_image(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The `ZImagePipeline` of a folder in float32, and its default settings. Missing components and settings come from
    its base.

    Raises:
        FastgenError: the folder has another pipeline, or one with dynamic chunking.
    """
    checkpoint = find_checkpoint(folder)
    if checkpoint.pipeline_class != "ZImagePipeline":
        raise FastgenError(f"{folder} has a {checkpoint.pipeline_class}; needs a ZImagePipeline")
    return load_checkpoint(checkpoint, dtype="float32"), dict(checkpoint.defaults)


def save_pipeline(
    folder: Path, pipe: Any, defaults: dict[str, Any], transformer: torch.nn.Module | None = None
) -> None:
    """Save a whole Z-Image pipeline in half precision, with the defaults of `fastgen generate`.

    Args:
        folder: a new folder.
        pipe: shares its weights with the trained module; not changed.
        defaults: default settings.
        transformer: replaces the pipeline's.
    """
    copied = copy.deepcopy(pipe)
    if transformer is not None:
        copied.register_modules(transformer=copy.deepcopy(transformer))
    copied.register_modules(tokenizer=build_text_tokenizer())  # ours has the padding settings of training
    for part in (copied.transformer, copied.text_encoder, copied.vae):
        part.to(torch.float16)
    copied.save_pretrained(folder)
    write_defaults(folder, **defaults)


@torch.no_grad()
def text_features(text_encoder: torch.nn.Module, batch: dict[str, Any]) -> Tensor:
    """Features [n, L, D] of tokenised captions from a frozen text encoder, as the pipeline uses them."""
    mask = batch["attention_mask"]
    text_encoder.to(mask.device)
    hidden = text_encoder(batch["input_ids"], attention_mask=mask, output_hidden_states=True)
    features: Tensor = hidden.hidden_states[-2]
    return features
