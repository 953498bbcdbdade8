"""Cheap previews: who is shown what, of which shape, and that no picture is decoded twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, ZImagePipeline
from long_tail import long_tail
from tiny_flows import tiny_flux, tiny_qwen_image, tiny_sana
from tiny_pipelines import loaded
from tiny_unets import ddim, tiny_sd, with_scheduler
from torch import Tensor

from fastgen.accounting import account, count_flops
from fastgen.drafters.targets.base import unit_range
from fastgen.pipelines.loading.checkpoint import embedded_folder
from fastgen.pipelines.noise_search import NoiseSearchPipeline, SearchInterrupted
from fastgen.pipelines.search.denoisers.base import Denoiser, Settings, as_bytes, denoiser_of
from fastgen.pipelines.search.interpolants import Prediction
from fastgen.pipelines.search.policies import Threshold, ValueSampling
from fastgen.pipelines.search.previews import preview_of
from fastgen.pipelines.search.starts import BestOfN

CALL: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
    "guidance_scale": 2.0,
    "output_type": "pt",
}


@pytest.fixture(scope="module")
def tiny() -> ZImagePipeline:
    return loaded(ZImagePipeline, embedded_folder("tiny"))


def small_decoder(channels: int = 16, **config: Any) -> AutoencoderTiny:
    """Four times larger pictures than latents, with random weights."""
    torch.manual_seed(0)
    blocks: dict[str, Any] = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    widths: dict[str, Any] = {name: (8, 8, 8) for name in ("encoder_block_out_channels", "decoder_block_out_channels")}
    return AutoencoderTiny(latent_channels=channels, **blocks, **widths, **config).eval()


@contextmanager
def decoded(pipe: Any) -> Iterator[list[tuple[int, int]]]:
    """Rows and heights of what the pipeline's VAE is given meanwhile."""
    stock, seen = pipe.vae.decode, []

    def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((len(latents), latents.shape[-2]))
        return stock(latents, *args, **kwargs)

    pipe.vae.decode = decode
    try:
        yield seen
    finally:
        del pipe.vae.decode


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, 64, 64)
    means = images.float().mean(dim=(2, 3))
    return (means[:, 0] - means[:, 1:].mean(dim=1)) / 255


POLICIES = {
    "svdd": ValueSampling(chains=1, candidates=2),
    "threshold": Threshold(0.1, starts=2),
    "best-of-n": BestOfN(n=2),
}


@pytest.mark.parametrize(
    ("policy", "preview"),
    long_tail(
        [(policy, preview) for policy in POLICIES for preview in ("full", "pooled", "decoder")],
        fast=[("svdd", "pooled"), ("threshold", "full"), ("threshold", "decoder"), ("best-of-n", "pooled")],
        unpack=True,
    ),
)
def test_ends_are_decoded_in_full_and_once(tiny: ZImagePipeline, policy: str, preview: str) -> None:
    option = small_decoder() if preview == "decoder" else preview
    with decoded(tiny) as seen:
        output = NoiseSearchPipeline(tiny, redness, POLICIES[policy])(
            "a heart", max_nfe=40, preview=option, generator=torch.Generator().manual_seed(0), **CALL
        )
    (report,) = output.reports
    scored = [row for row in report.trees[0] if row[3] is not None]
    ends = sum(row[2] == 2 for row in scored)
    assert sum(rows for rows, height in seen if height == 16) == (len(scored) if preview == "full" else ends)
    assert sum(rows for rows, height in seen if height == 8) == (len(scored) - ends if preview == "pooled" else 0)
    assert ("preview" in output.stats.seconds) == (preview != "full" and ends < len(scored))
    picture = output.images.mul(255).round().to(torch.uint8)
    assert float(redness(picture, ["a heart"])) == report.score
    assert output.stats.verifier_calls == len(scored)


def test_previews_change_scores_before_the_end_only(tiny: ZImagePipeline) -> None:
    """Of one candidate at each time, the score cannot change the way."""
    found = {}
    for preview in ("full", "pooled", small_decoder()):
        search = NoiseSearchPipeline(tiny, redness, ValueSampling(chains=1, candidates=1))
        found[str(type(preview)) + str(preview)[:4]] = search(
            "a red circle", preview=preview, generator=torch.Generator().manual_seed(0), **CALL
        )
    full, *others = found.values()
    for other in others:
        assert torch.equal(full.images, other.images) and full.reports[0].score == other.reports[0].score
        for row, also in zip(full.reports[0].trees[0][:-1], other.reports[0].trees[0][:-1], strict=True):
            assert row[:3] == also[:3] and row[3] != also[3]


def shown(pipe: Any, settings: Settings, option: Any) -> tuple[Denoiser, Prediction, Tensor]:
    denoiser = denoiser_of(pipe)(pipe, ["a cat"], settings)
    latents = torch.cat([denoiser.noise(torch.Generator().manual_seed(i)) for i in range(2)]) * 0.3
    said = Prediction(latents, torch.zeros_like(latents))
    preview = preview_of(option, denoiser)
    assert preview is not None
    return denoiser, said, preview(denoiser, said)


PACKED = [
    (lambda: tiny_flux(distilled=False), Settings(2, 0.0, 24, 40, extra={"max_sequence_length": 8})),
    (tiny_qwen_image, Settings(2, None, 24, 40, extra={"max_sequence_length": 8})),
    (lambda: with_scheduler(tiny_sd, ddim()), Settings(2, 2.0, 24, 40)),
    (tiny_sana, Settings(2, 2.0, 32, 64, extra={"use_resolution_binning": False, "max_sequence_length": 8})),
]


@pytest.mark.parametrize(("make", "settings"), PACKED, ids=["flux", "qwen-image", "sd", "sana"])
def test_pooled_pictures_are_of_the_size_and_colours_of_full_ones(make: Any, settings: Settings) -> None:
    """Of constant latents they are the full picture except for its borders; of others they are not."""
    denoiser, said, pictures = shown(make(), settings, "pooled")
    full = denoiser.pictures(said)
    assert pictures.shape == full.shape and pictures.dtype == torch.uint8
    grid = denoiser.unpacked(said.at(denoiser.final))
    height, width = grid.shape[-2:]
    flat = grid.reshape(-1, 1, height, width)
    small = F.adaptive_avg_pool2d(flat, ((height + 1) // 2, (width + 1) // 2))
    with torch.no_grad():
        pixels = denoiser.decode(small.reshape(*grid.shape[:-2], *small.shape[-2:])).float()
    manual = as_bytes(F.interpolate(pixels, full.shape[-2:], mode="bilinear"))
    assert torch.equal(pictures, manual) and not torch.equal(pictures, full)


def test_odd_sizes_are_pooled_too() -> None:
    pipe = with_scheduler(tiny_sd, ddim())
    denoiser, said, _ = shown(pipe, Settings(2, 2.0, 32, 32), "pooled")
    odd = Prediction(said.clean[..., :7, :5], said.noise[..., :7, :5])
    preview = preview_of("pooled", denoiser)
    assert preview is not None and preview(denoiser, odd).shape == denoiser.pictures(odd).shape


def test_sana_cuts_pooled_pictures_as_it_cuts_full_ones() -> None:
    pipe = tiny_sana(sample_size=16, blocks=6)
    settings = Settings(2, 2.0, 500, 512, extra={"max_sequence_length": 8, "use_resolution_binning": True})
    denoiser, said, pictures = shown(pipe, settings, "pooled")
    assert pictures.shape == denoiser.pictures(said).shape == (2, 3, 500, 512)


@pytest.mark.parametrize("factors", [(1.0, 0.0), (0.5, 0.25)])
def test_a_small_decoder_reads_latents_as_in_the_place_of_the_vae(tiny: ZImagePipeline, factors: Any) -> None:
    scaling, shift = factors
    decoder = small_decoder(scaling_factor=scaling, shift_factor=shift)
    _, said, pictures = shown(tiny, Settings(2, 2.0, 64, 64), decoder)
    with torch.no_grad():
        expected = unit_range(decoder.decode(said.clean / scaling + shift).sample)
    assert torch.equal(pictures, as_bytes(expected))
    _, _, again = shown(
        tiny, Settings(2, 2.0, 64, 64), lambda x: decoder.decode(x / scaling + shift, return_dict=False)
    )
    assert torch.equal(pictures, again)
    half = small_decoder(scaling_factor=scaling, shift_factor=shift).to(torch.bfloat16)
    _, _, rough = shown(tiny, Settings(2, 2.0, 64, 64), half)
    assert float((rough.float() - pictures.float()).abs().mean()) < 4


def test_packed_latents_reach_a_small_decoder_as_a_grid() -> None:
    pipe = tiny_flux(distilled=False)
    _, said, pictures = shown(pipe, PACKED[0][1], lambda latents: latents[:, :3])
    assert pictures.shape[0] == len(said.clean) and pictures.shape[2] * 40 == pictures.shape[3] * 24


def test_pooling_saves_flops(tiny: ZImagePipeline) -> None:
    denoiser = denoiser_of(tiny)(tiny, ["a heart"], Settings(2, 2.0, 64, 64))
    latents = denoiser.noise(torch.Generator().manual_seed(0))
    said, preview = Prediction(latents, latents), preview_of("pooled", denoiser)
    assert preview is not None
    with account() as full, count_flops():
        denoiser.pictures(said)
    with account() as cheap, count_flops():
        preview(denoiser, said)
    assert 0 < cheap.flops < 0.27 * full.flops and set(cheap.seconds) == {"preview"}


def test_bad_previews(tiny: ZImagePipeline) -> None:
    asked: list[int] = []

    def verifier(images: Tensor, prompts: list[str]) -> Tensor:
        asked.append(len(images))
        return redness(images, prompts)

    search = NoiseSearchPipeline(tiny, verifier, Threshold(0.5, starts=2))
    for option, word in (("small", "'small' is unknown"), (3, "int has no decode"), (small_decoder(4), "4 channels")):
        with pytest.raises(ValueError, match=f"preview: .*{word}"):
            search("a heart", max_nfe=80, preview=option, **CALL)
    assert not asked
    for wrong in (lambda latents: latents, lambda latents: latents[:, :3, 0], lambda latents: (latents[:0, :3],)):
        with pytest.raises(SearchInterrupted, match=r"preview: gave shape .*needs \(1, 3, height, width\)"):
            search("a heart", max_nfe=80, preview=wrong, **CALL)


def test_verifiers_see_pictures_and_not_noise(tiny: ZImagePipeline) -> None:
    """A pooled preview of a real sample is close to its full decode."""
    denoiser = denoiser_of(tiny)(tiny, ["a red circle"], Settings(8, 2.0, 64, 64))
    output = NoiseSearchPipeline(tiny, redness, BestOfN(n=1))(
        "a red circle", **{**CALL, "num_inference_steps": 8, "output_type": "np"}
    )
    pixels = torch.from_numpy(np.asarray(output.images)).permute(0, 3, 1, 2)
    with torch.no_grad():
        config = tiny.vae.config
        latents = (tiny.vae.encode(pixels * 2 - 1).latent_dist.mean - config.shift_factor) * config.scaling_factor
    said, preview = Prediction(latents, latents), preview_of("pooled", denoiser)
    assert preview is not None
    error = (preview(denoiser, said).float() - denoiser.pictures(said).float()).abs().mean()
    assert float(error) < 20
