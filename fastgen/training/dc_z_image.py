"""Recipes `dc` and `dc-dense`: a small Z-Image with dynamic chunking, and the same transformer without it.

Both train a transformer alone, on noisy ShapesWorld latents, with the VAE and the text encoder of a trained pipeline,
on the same batches; what differs is the transformer. The target is the velocity that the pipeline's own transformer
predicts (or, without a teacher, the data's): it is what the data's velocity is on average, without its noise, so that
a small model learns from few pictures. `dc` draws a tail drop for every batch (multi-budget training, section 7 of
arXiv 2603.06351), after a warm-up with none, and adds the ratio loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.data.shapes import ShapesWorld
from fastgen.models.chunking import ratio_loss
from fastgen.models.dc_z_image import DCZImageTransformer2DModel
from fastgen.models.upcycle import upcycle
from fastgen.models.z_image_batch import forward_batch, use_real_rotary
from fastgen.pretrained import load_pretrained
from fastgen.training.cards import write_record
from fastgen.training.flow_matching import TokenMetric, encode_latents, flow_matching_batch
from fastgen.training.layout import LayoutHead, patch_labels
from fastgen.training.z_image import GUIDANCE_SCALE, STEPS, captioned, save_pipeline, text_features

BUDGETS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
RATIO_WEIGHT = 0.03
_LAYOUT_WEIGHT = 0.5
# Weighted velocity error and layout loss together are several times DiT's loss, for which the paper chose 0.03: with
# that, the router kept 36 % and rising after 600 steps.
_SCALED_RATIO_WEIGHT = 0.1

#: The transformer of both recipes: with it, both checkpoints together take less than 8 MB. Deep rather than wide: the
#: scaffold costs as much as one or two blocks whatever the width.
SHAPE: dict[str, Any] = {
    "in_channels": 16,
    "dim": 96,
    "n_layers": 7,
    "n_refiner_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [8, 8, 8],
    "axes_lens": [160, 32, 32],
}


def draw_tail_drop(start: int, warm_up: int, generator: torch.Generator) -> float:
    """The tail drop of the batch that begins with item `start`: one of `BUDGETS`, 0 in the first `warm_up` items."""
    drawn = BUDGETS[int(torch.randint(len(BUDGETS), (), generator=generator))]
    return 0.0 if start < warm_up else drawn


#: The scaffold of `dc`. A quarter of the backbone's width, 24, is little more than the 16 channels of the latents (the
#: paper has 4 and at least 96), and all that positions are to say goes through it.
SCAFFOLD: dict[str, Any] = {"scaffold_dim": 48, "scaffold_blocks": 1}


class DCModule(torch.nn.Module):
    """Transformer with dynamic chunking and the read-out of the layout loss."""

    adamw_names = ("scaffold", "adaptor", "t_embedder", "cap_embedder", "adaLN", "layout")
    compiled_shapes = None  # the number of kept tokens is another one in every batch

    def __init__(self, transformer: DCZImageTransformer2DModel) -> None:
        super().__init__()
        # The blocks: one graph serves them all, and every number of tokens.
        groups = ("context_refiner", "noise_refiner", "layers")
        blocks = {group: len(getattr(transformer, group)) for group in groups}
        self.compiled_parts = [f"transformer.{group}.{i}" for group, n in blocks.items() for i in range(n)]
        self.transformer = transformer
        self.layout = LayoutHead(transformer.config.dim)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        captions: list[Tensor],
        tail_drop: float,
        shapes: Tensor,
        colors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """Velocity [n, C, h, w], layout loss, ratio loss, and the kept share of the natural sets."""
        images = list(latents[:, :, None].unbind(0))
        output = self.transformer(images, timestep, captions, tail_drop=tail_drop, output_chunks=True)
        chunks = output.chunks
        ratio = ratio_loss(chunks.probabilities, chunks.natural, self.transformer.config.compression)
        layout = self.layout(output.decoded, shapes, colors)
        return torch.cat(output.sample, dim=1).transpose(0, 1), layout, ratio, float(chunks.natural.float().mean())


class DenseModule(torch.nn.Module):
    """The transformer without dynamic chunking, likewise; the layout is read after block `probe`, or the last."""

    adamw_names = ("all_x_embedder", "all_final_layer", "t_embedder", "cap_embedder", "adaLN", "layout")
    compiled_parts = ("",)

    def __init__(self, transformer: torch.nn.Module, probe: int | None = None) -> None:
        super().__init__()
        self.transformer = transformer
        self.probe = len(transformer.layers) - 1 if probe is None else probe  # type: ignore[arg-type]
        self.layout = LayoutHead(transformer.dim)  # type: ignore[arg-type]

    def forward(
        self, latents: Tensor, timestep: Tensor, captions: Tensor, lengths: Tensor, shapes: Tensor, colors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Velocity [n, C, h, w] and layout loss."""
        output, tokens = forward_batch(self.transformer, latents, timestep, captions, lengths, probe=self.probe)
        return output, self.layout(tokens, shapes, colors)


class DCRecipe:
    """A transformer with dynamic chunking learns the velocity.

    Args:
        seed: seed of weights and data.
        pipeline: folder of a trained `ZImagePipeline`, for its VAE and text encoder, and as the teacher.
        init: folder of a transformer to go on from; of a stock one, it is upcycled. None starts from random weights.
        dense: train the transformer without dynamic chunking.
        warm_up: batches of tail drop 0 at the start, in items.
        teacher: learn from the pipeline's transformer; else from the data (flow matching).
        scaffold: configuration of a new scaffold where it is not `SCAFFOLD`.
    """

    def __init__(
        self,
        seed: int,
        pipeline: Path,
        init: Path | None = None,
        dense: bool = False,
        warm_up: int = 20_000,
        teacher: bool = True,
        **scaffold: Any,
    ) -> None:
        from diffusers import ZImagePipeline, ZImageTransformer2DModel

        self.name = "dc-dense" if dense else "dc"
        self.dense, self.warm_up = dense, warm_up
        unused: dict[str, Any] = {} if teacher else {"transformer": None}
        pipe = load_pretrained(ZImagePipeline, pipeline, torch_dtype=torch.float32, **unused)
        self.teacher: Any = None
        if teacher:
            self.teacher = pipe.transformer.eval().requires_grad_(False)
            use_real_rotary(self.teacher)
            pipe.register_modules(transformer=None)
        self.pipe, self.tokenizer = pipe, pipe.tokenizer
        self.vae = pipe.vae.eval().requires_grad_(False)
        self.text_encoder = pipe.text_encoder.eval().requires_grad_(False)
        self.data = ShapesWorld(seed + 606)
        images = torch.from_numpy(self.data.batch(256, 10_000_000).images)
        self.metric = TokenMetric(encode_latents(self.vae, images, torch.Generator().manual_seed(seed)))
        torch.manual_seed(seed)
        if init is not None and not dense and "DCZImage" in (init / "config.json").read_text(encoding="utf-8"):
            self.transformer: torch.nn.Module = load_pretrained(DCZImageTransformer2DModel, init)
            return
        if init is not None:
            stock = load_pretrained(ZImageTransformer2DModel, init, torch_dtype=torch.float32)
        else:
            stock = ZImageTransformer2DModel(cap_feat_dim=self.text_encoder.config.hidden_size, **SHAPE)
            for token in (stock.x_pad_token, stock.cap_pad_token):
                torch.nn.init.normal_(token, std=0.02)
        self.transformer = stock if dense else upcycle(stock, **{**SCAFFOLD, **scaffold})

    def build(self) -> torch.nn.Module:
        """The transformer and the head of the layout loss."""
        self.transformer.train()
        if not self.dense:
            return DCModule(self.transformer)  # type: ignore[arg-type]
        use_real_rotary(self.transformer)
        self.transformer.x_pad_token.requires_grad_(False)
        return DenseModule(self.transformer)

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Renders, their tokenised captions (some dropped), labels, and the batch's tail drop."""
        data = self.data.batch(size, start)
        items, _ = captioned(data, self.tokenizer, generator)
        return {
            **items,
            **patch_labels(data, 8 if self.dense else 4),
            "tail_drop": draw_tail_drop(start, self.warm_up, generator),
        }

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of the velocity, plus layout loss, plus ratio loss."""
        latents = encode_latents(self.vae, batch["images"], generator)
        noisy, sigma, target = flow_matching_batch(latents, generator)
        features, lengths = text_features(self.text_encoder, batch), batch["attention_mask"].sum(dim=1)
        if self.teacher is not None:
            with torch.no_grad():
                target = forward_batch(self.teacher.to(noisy.device), noisy, 1 - sigma, features, lengths)[0].float()
        labels = (batch["patch_shapes"], batch["patch_colors"])
        numbers: dict[str, float] = {}
        if self.dense:
            output, layout = module(noisy, 1 - sigma, features, lengths, *labels)
            extra = torch.zeros((), device=latents.device)
        else:
            captions = [row[:length] for row, length in zip(features, lengths.tolist(), strict=True)]
            output, layout, extra, kept = module(noisy, 1 - sigma, captions, batch["tail_drop"], *labels)
            numbers = {"ratio": float(extra.detach()), "kept": kept, "tail_drop": batch["tail_drop"]}
        error, measured = self.metric.loss(output, target, sigma)
        numbers |= {**measured, "layout": float(layout.detach())}
        return error + _LAYOUT_WEIGHT * layout + _SCALED_RATIO_WEIGHT * extra, numbers

    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Save a whole pipeline in half precision; without dynamic chunking it is a stock one."""
        defaults = {"height": 64, "width": 64, "steps": STEPS, "guidance_scale": GUIDANCE_SCALE}
        save_pipeline(folder, self.pipe, defaults, self.transformer)
        write_record(folder, self.name, record)
