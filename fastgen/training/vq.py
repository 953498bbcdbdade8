"""Recipe `vq`: the VQ tokenizer of the tiny Janus, trained on ShapesWorld renders.

Janus looks up codes by Euclidean distance in encoding and L2-normalises them in decoding; both agree if the codebook
is on the unit sphere, so it is kept there. Codes are an exponential moving average of their assigned vectors; unused
codes are reset to vectors of the current batch, so that the whole codebook stays in use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, reduce
from transformers.models.janus.modeling_janus import JanusVQVAE

from fastgen.data.shapes import ShapesWorld
from fastgen.models.tiny_janus import build_janus
from fastgen.training.cards import write_record
from fastgen.training.vae import reconstruction_loss, to_pixels

HELD_OUT = 1024
"""New renders on which a trained model is evaluated."""
_COMMITMENT = 0.25
_CODE_DECAY = 0.99
_DEAD_BELOW = 0.03  # a code is dead if its average count per batch is below this share of a uniform share


class VqModule(torch.nn.Module):
    """The VQ model with the running statistics of its codebook."""

    counts: torch.Tensor
    sums: torch.Tensor

    def __init__(self, model: JanusVQVAE) -> None:
        super().__init__()
        self.model = model
        codes = model.quantize.embedding.weight
        codes.requires_grad_(False)
        with torch.no_grad():
            codes.copy_(F.normalize(codes, dim=-1))
        self.register_buffer("counts", torch.zeros(len(codes)))
        self.register_buffer("sums", codes.detach().clone())

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unit vectors before quantisation, [n, h, w, d]."""
        hidden = self.model.quant_conv(self.model.encoder(pixels))
        return F.normalize(hidden.permute(0, 2, 3, 1), dim=-1)

    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """Index of the nearest code of each unit vector [..., d]."""
        return (vectors @ self.model.quantize.embedding.weight.T).argmax(dim=-1)

    def decode(self, vectors: torch.Tensor) -> torch.Tensor:
        """Pixels from (quantised) unit vectors [n, h, w, d]."""
        output: torch.Tensor = self.model.decoder(self.model.post_quant_conv(vectors.permute(0, 3, 1, 2)))
        return output

    def forward(
        self, pixels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Straight-through reconstruction, commitment loss and codes [n, h, w]; updates the codebook in training."""
        vectors = self.encode(pixels)
        indices = self.nearest(vectors)
        quantised = self.model.quantize.embedding(indices)
        commitment = (vectors - quantised).square().sum(dim=-1).mean()
        output = self.decode(vectors + (quantised - vectors).detach())
        if self.training:
            self.update_codes(vectors.detach(), indices, generator)
        return output, commitment, indices

    @torch.no_grad()
    def update_codes(self, vectors: torch.Tensor, indices: torch.Tensor, generator: torch.Generator) -> None:
        """Move each code to the running mean direction of its vectors; reset dead codes to vectors of the batch.

        Counts and sums cover all processes, and the new vectors come from the first: all have the same codebook.
        """
        vectors, indices = vectors.reshape(-1, vectors.shape[-1]).float(), indices.reshape(-1)
        codes = self.model.quantize.embedding.weight
        counts = reduce(torch.bincount(indices, minlength=len(codes)).float(), "sum")
        sums = reduce(torch.zeros_like(codes).index_add_(0, indices, vectors), "sum")
        self.counts.lerp_(counts, 1 - _CODE_DECAY)
        self.sums.lerp_(sums, 1 - _CODE_DECAY)
        even = counts.sum() / len(codes)
        dead = self.counts < _DEAD_BELOW * even
        pick = torch.randint(len(vectors), (len(codes),), generator=generator).to(vectors.device)
        fresh = broadcast(vectors[pick])
        self.sums[dead] = fresh[dead]
        self.counts[dead] = even
        codes.copy_(F.normalize(self.sums, dim=-1))


class VqRecipe:
    """Straight-through VQ autoencoding with a commitment loss.

    Args:
        seed: seed of weights and data.
    """

    name = "vq"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.data = ShapesWorld(seed + 202, held_out=False)

    def build(self) -> VqModule:
        """The VQ model of the tiny Janus with new weights."""
        module = VqModule(build_janus(self.seed).model.vqmodel.to(memory_format=torch.channels_last))
        self.codes = len(module.counts)
        return module

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Renders as uint8 [size, 64, 64, 3]."""
        return {"images": torch.from_numpy(self.data.batch(size, start).images)}

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Reconstruction + commitment; codes are updated by running means."""
        pixels = to_pixels(batch["images"])
        output, commitment, indices = module(pixels, generator)
        with torch.no_grad():
            mse = (output - pixels).square().mean()
            used = len(indices.unique()) / self.codes
        loss = reconstruction_loss(output, pixels) + _COMMITMENT * commitment
        return loss, {
            "psnr": float(10 * torch.log10(4.0 / mse)),
            "commitment": float(commitment.detach()),
            "used": used,
        }

    @torch.no_grad()
    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Save the VQ weights to `folder/vq`, with code use and PSNR on new renders."""
        if not isinstance(module, VqModule):
            raise TypeError(f"recipe vq trains a VqModule, got {type(module).__name__}")
        pixels = to_pixels(torch.from_numpy(self.data.batch(HELD_OUT, 10_000_000).images))
        indices, errors = [], []
        for part in pixels.to(module.counts.device).split(64):
            codes = module.nearest(module.encode(part))
            indices.append(codes.flatten())
            output = module.model.decode(codes.flatten(1)).clamp(-1, 1)
            errors.append((output - part).square().mean(dim=(1, 2, 3)))
        counts = torch.bincount(torch.cat(indices), minlength=len(module.counts)).double()
        share = counts / counts.sum()
        entropy = -(share[share > 0] * share[share > 0].log2()).sum()
        record = {
            **record,
            "code_use": round(float((counts > 0).double().mean()), 4),
            "code_entropy_bits": round(float(entropy), 3),
            "held_out_psnr": round(float(10 * torch.log10(4.0 / torch.cat(errors).mean())), 2),
        }
        module.model.save_pretrained(folder / "vq")
        write_record(folder, "vq", record)


@torch.no_grad()
def image_tokens(vq: Any, images: torch.Tensor) -> torch.Tensor:
    """Tokens [n, N] of uint8 images from a trained `JanusVQVAE`, always in float32: in bfloat16, three of four tokens
    of the embedded VQ tokenizer get another code."""
    with torch.autocast(images.device.type, enabled=False):
        tokens: torch.Tensor = vq.to(images.device).encode(to_pixels(images), return_dict=True).image_tokens
    return tokens.view(len(images), -1)
