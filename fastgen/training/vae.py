"""Recipe `vae`: the AutoencoderKL of the tiny `ZImagePipeline`, trained on ShapesWorld renders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastgen.data.shapes import ShapesWorld
from fastgen.models.tiny_z_image import build_vae
from fastgen.training.cards import write_record

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

HELD_OUT = 256
"""New renders whose latents define the scale, and on which a trained model is evaluated."""
_KL_WEIGHT = 1e-3


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> float [n, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 plus a mean squared error, which penalises the large errors at edges."""
    error = output - target
    return error.abs().mean() + 2.0 * error.square().mean()


class VaeModule(torch.nn.Module):
    """The autoencoder, with a training step in one forward pass."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance [n, C, h, w] of the posterior of pixels [n, 3, H, W]."""
        mean, logvar = self.vae.encoder(pixels).float().chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstruction from the latent mean + deviation * noise, and the KL divergence per latent element."""
        mean, logvar = self.encode(pixels)
        output = self.vae.decoder(mean + (0.5 * logvar).exp() * noise)
        return output, 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


class VaeRecipe:
    """L1 + squared error + a small KL term; afterwards scale and shift are set from the latents of new renders.

    Args:
        seed: seed of the data.
    """

    name = "vae"

    def __init__(self, seed: int = 0) -> None:
        self.data = ShapesWorld(seed + 101, held_out=False)

    def build(self) -> VaeModule:
        """The autoencoder with new weights."""
        self.vae = build_vae().to(memory_format=torch.channels_last)
        return VaeModule(self.vae)

    def batch(self, start: int, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Renders as uint8 [size, 64, 64, 3]."""
        return {"images": torch.from_numpy(self.data.batch(size, start).images)}

    def loss(
        self, module: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Reconstruction from a sampled latent."""
        pixels = to_pixels(batch["images"])
        side = pixels.shape[-1] // 2 ** (len(self.vae.config.block_out_channels) - 1)
        noise = torch.randn(len(pixels), self.vae.config.latent_channels, side, side, generator=generator)
        output, kl = module(pixels, noise.to(pixels.device))
        with torch.no_grad():
            mse = (output - pixels).square().mean()
        loss = reconstruction_loss(output, pixels) + _KL_WEIGHT * kl
        return loss, {"psnr": float(10 * torch.log10(4.0 / mse)), "kl": float(kl.detach())}

    @torch.no_grad()
    def export(self, module: torch.nn.Module, folder: Path, record: dict[str, Any]) -> None:
        """Set scaling and shift so that latents have mean 0 and deviation 1, then save to `folder/vae`."""
        images = torch.from_numpy(self.data.batch(HELD_OUT, 10_000_000).images)
        pixels = to_pixels(images).to(next(module.parameters()).device)
        mean, logvar = module.encode(pixels)  # type: ignore[operator]
        deviation = (mean.var() + logvar.exp().mean()).sqrt()
        self.vae.register_to_config(
            scaling_factor=round(float(1 / deviation), 5), shift_factor=round(float(mean.mean()), 5)
        )
        output = self.vae.decoder(mean)
        mse = (output.clamp(-1, 1) - pixels).square().mean()
        record = {**record, "held_out_psnr": round(float(10 * torch.log10(4.0 / mse)), 2)}
        self.vae.save_pretrained(folder / "vae")
        write_record(folder, "vae", record)
