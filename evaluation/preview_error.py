"""How far the previews that a noise search scores are from full ones: pixels, and the order of the scores."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.accounting import account
from fastgen.pipelines.search.denoisers.base import Denoiser, Settings, denoiser_of
from fastgen.pipelines.search.interpolants import Prediction
from fastgen.pipelines.search.previews import Preview, PreviewOption, preview_of
from fastgen.pipelines.search.samplers import Ancestral

__all__ = ["PreviewError", "preview_error"]


@dataclass(frozen=True)
class PreviewError:
    """Previews against full evaluations and decodes of the same samples, at each time.

    Attributes:
        times: noise levels, falling.
        pixels: mean absolute difference, of 255.
        ranks: Spearman's correlation of a verifier's scores over the trajectories of a prompt, averaged over prompts;
            None without a verifier, and at a time where all scores of every prompt are equal.
        seconds: of a sample, by phase: "denoise" and "decode" of full ones, "explore" and "preview" of the others.
    """

    times: list[float]
    pixels: list[float]
    ranks: list[float | None] | None
    seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@torch.no_grad()
def preview_error(
    pipe: Any,
    prompts: Sequence[Any],
    samples: int = 4,
    *,
    preview: PreviewOption = "pooled",
    explore: Mapping[str, Any] | None = None,
    verifier: Callable[[Tensor, list[Any]], Tensor] | None = None,
    seed: int = 0,
    batch_size: int = 32,
    settings: Settings | None = None,
) -> PreviewError:
    """Measure previews along stochastic trajectories of full evaluations.

    Args:
        pipe: a diffusers pipeline with an adapter.
        prompts: of it.
        samples: trajectories of each prompt.
        preview, explore: as in `NoiseSearchPipeline.__call__`.
        verifier: scores pictures [k, 3, H, W] uint8 for k prompts, or has such a `score`; None: pixels alone.
        seed: of the first trajectory.
        batch_size: rows of a forward pass.
        settings: steps, guidance scale, size.

    Raises:
        ValueError: nothing to draw, a single trajectory whose scores are to be ordered, or a bad option.
    """
    score = getattr(verifier, "score", verifier)
    if not prompts or samples < (1 if score is None else 2) or batch_size < 1:
        raise ValueError(
            "prompts, samples, batch_size: need one at least, and two samples of a prompt to order scores"
        )
    denoiser = denoiser_of(pipe)(pipe, prompts, settings or Settings())
    shown = preview_of(preview, denoiser)
    path = Ancestral(denoiser.interpolant, denoiser.times)
    which = torch.arange(len(prompts)).repeat_interleave(samples)
    texts = [prompts[row] for row in which.tolist()]
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(which))]
    latents = torch.cat([denoiser.noise(generator) for generator in generators])
    pixels: list[float] = []
    ranks: list[float | None] = []
    with account() as stats:
        for index in range(len(path.times)):
            parts = [
                _compared(denoiser, latents[part], path.times[index], which[part], dict(explore or {}), shown)
                for part in _slices(len(which), batch_size)
            ]
            full, cheap = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
            pixels.append(float((full.float() - cheap.float()).abs().mean()))
            if score is not None:
                found = [torch.as_tensor(score(pictures, texts)).view(-1, samples) for pictures in (full, cheap)]
                ranks.append(_rank_correlation(*found))
            if index < path.transitions:
                said = [part[0] for part in parts]
                whole = Prediction(torch.cat([p.clean for p in said]), torch.cat([p.noise for p in said]))
                noise = torch.cat([denoiser.restless(generator) for generator in generators])
                latents = path.step(latents, whole, index, noise)
    rows_drawn = len(which) * len(path.times)
    seconds = {name: spent / rows_drawn for name, spent in stats.seconds.items()}
    return PreviewError(list(path.times), pixels, None if score is None else ranks, seconds)


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, count, size))


def _compared(
    denoiser: Denoiser, latents: Tensor, time: float, which: Tensor, explore: dict[str, Any], shown: Preview | None
) -> tuple[Prediction, Tensor, Tensor]:
    """The full prediction, its full picture, and the preview."""
    times, which = torch.full((len(latents),), time, dtype=torch.float64), which.to(latents.device)
    said = cheap = denoiser.predict(latents, times, which)
    if explore:
        with denoiser.at_effort(explore):
            cheap = denoiser.predict(latents, times, which)
    return said, denoiser.pictures(said), denoiser.pictures(cheap) if shown is None else shown(denoiser, cheap)


def _rank_correlation(full: Tensor, cheap: Tensor) -> float | None:
    """Mean of the rows' Spearman correlations [prompts, samples] that there are."""
    from scipy.stats import spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant rows have none
        found = [float(spearmanr(a.cpu(), b.cpu()).statistic) for a, b in zip(full, cheap, strict=True)]
    known = [value for value in found if not math.isnan(value)]
    return sum(known) / len(known) if known else None
