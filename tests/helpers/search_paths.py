"""The deterministic path of a search's adapter, to be compared with the picture of the stock pipeline."""

from __future__ import annotations

from typing import Any

import torch

from fastgen.pipelines.search.denoisers.base import Settings, denoiser_of
from fastgen.pipelines.search.samplers import Sampler


def deterministic(pipe: Any, prompts: list[Any], seeds: list[int], settings: Settings) -> torch.Tensor:
    """Pictures [B, 3, H, W] of the ODE by the adapter, all prompts together."""
    denoiser = denoiser_of(pipe)(pipe, prompts, settings)
    sampler = Sampler(denoiser.interpolant, denoiser.times)
    latents = torch.cat([denoiser.begin(torch.Generator().manual_seed(seed), row) for row, seed in enumerate(seeds)])
    which = torch.arange(len(prompts))
    for index in range(len(denoiser.times)):
        times = torch.full((len(prompts),), denoiser.times[index], dtype=torch.float64)
        said = denoiser.predict(latents, times, which)
        if index < sampler.transitions:
            latents = sampler.step(latents, said, index, None)
    with torch.no_grad():
        return denoiser.decode_of(said.at(denoiser.final), which)
