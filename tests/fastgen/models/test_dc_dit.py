"""DCDiTTransformer2DModel: sizes, packing, gradients, stock interfaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen.accounting import account, count_flops
from fastgen.models.dc_dit import PRESETS, DCDiTTransformer2DModel, sincos_positions
from fastgen.models.routers import ROUTERS
from fastgen.models.scaffold import RESIDUAL_GATES


def micro(seed: int = 0, **config: Any) -> DCDiTTransformer2DModel:
    """Random weights everywhere: with the zero initialisations of training nothing would depend on anything."""
    torch.manual_seed(seed)
    shape = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "num_classes": 10, "sample_size": 8}
    model = DCDiTTransformer2DModel(**{**shape, **config}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


def inputs(samples: int = 3, height: int = 6, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(samples, 4, height, width, generator=generator)
    return latents, torch.randint(1000, (samples,), generator=generator), torch.arange(samples) % 11


# Parameters in millions and TFLOPs of 250 steps at 256 pixels (section 8 and 12), by kept share of the natural set.
PUBLISHED = {
    "S": (34.7, {0.2: 3.06, 0.5: 2.14}),
    "B": (137.0, {0.2: 11.94, 0.5: 8.55}),
    "L": (469.0, {0.1: 39.61, 0.3: 31.86}),
    "XL": (689.0, {0.0: 62.99, 0.2: 51.60, 0.4: 40.26}),
}


@pytest.mark.parametrize("size", list(PRESETS))
def test_presets_have_the_papers_parameters_and_flops(size: str) -> None:
    """FLOPs with the router's target share of kept tokens, 1 / N, less the tail; measured on meta tensors."""
    with torch.device("meta"):
        model = DCDiTTransformer2DModel.from_preset(size)
    millions, rows = PUBLISHED[size]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.015)
    if size == "S":  # see the slow test: a forward pass of the others takes seconds and gigabytes
        _check_flops(size, rows)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["B", "L", "XL"])
def test_large_presets_have_the_papers_flops(size: str) -> None:
    _check_flops(size, PUBLISHED[size][1])


def _check_flops(size: str, rows: dict[float, float]) -> None:
    model = DCDiTTransformer2DModel.from_preset(size).eval()
    for rho, teraflops in rows.items():
        with torch.no_grad(), account() as stats, count_flops():
            model(
                torch.randn(1, 4, 32, 32), torch.tensor([10]), torch.tensor([3]), token_budget=round(256 * (1 - rho))
            )
        assert stats.flops * 250 / 1e12 == pytest.approx(teraflops, rel=0.05), rho


@pytest.mark.parametrize("bad", [{"size": "M"}, {"size": "S", "image_size": 100}, {"size": "S", "image_size": 0}])
def test_unknown_presets(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="size"):
        DCDiTTransformer2DModel.from_preset(**bad)


@settings(max_examples=15, deadline=None)
@given(
    rhos=st.lists(st.floats(0, 0.95), min_size=1, max_size=4),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 100),
)
def test_a_batch_equals_its_samples_alone(rhos: list[float], grid: tuple[int, int], seed: int) -> None:
    model = micro(seed % 3)
    latents, timestep, labels = inputs(len(rhos), *grid, seed=seed)
    with torch.no_grad():
        batch = model(latents, timestep, labels, tail_drop=rhos, output_chunks=True)
        for i, rho in enumerate(rhos):
            part = slice(i, i + 1)
            alone = model(latents[part], timestep[part], labels[part], tail_drop=rho, output_chunks=True)
            assert torch.equal(alone.chunks.mask[0], batch.chunks.mask[i])
            torch.testing.assert_close(alone.sample[0], batch.sample[i], rtol=1e-4, atol=2e-5)


def test_a_single_kept_token_and_all_of_them() -> None:
    model = micro()
    latents, timestep, labels = inputs()
    with torch.no_grad():
        for budget in (1, 30):
            output = model(latents, timestep, labels, token_budget=budget, output_chunks=True)
            assert output.chunks.lengths == (budget,) * 3 and bool(torch.isfinite(output.sample).all())
        with pytest.raises(ValueError, match="token_budget"):
            model(latents, timestep, labels, token_budget=31)


def test_flops_fall_with_every_tail_drop() -> None:
    model = micro()
    flops = []
    for rho in (0.0, 0.2, 0.4, 0.6, 0.8):
        with torch.no_grad(), account() as stats, count_flops():
            model(*inputs(2, 16, 16), tail_drop=rho)
        flops.append(stats.flops)
    assert all(a > b for a, b in zip(flops, flops[1:], strict=False))


def test_positions_are_those_of_the_grid() -> None:
    """Tokens in another order, with their positions, give the same output in that order."""
    from dataclasses import replace

    model = micro()
    latents, timestep, labels = inputs(1)
    with torch.no_grad():
        conditioning = model.embedder(timestep, labels, hidden_dtype=torch.float32)
        chunked = model.scaffold.chunk(latents, conditioning, None, 12)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        straight = model.backbone(chunked.tokens, conditioning, chunked.chunks)
        moved = replace(chunked.chunks, positions=chunked.chunks.positions[order])
        shuffled = model.backbone(chunked.tokens[order], conditioning, moved)
        torch.testing.assert_close(shuffled, straight[order], rtol=1e-4, atol=1e-5)
        wrong = model.backbone(chunked.tokens[order], conditioning, chunked.chunks)
    assert not torch.allclose(wrong, straight[order], atol=1e-3)


def test_position_embedding_is_that_of_dit() -> None:
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
    theirs = get_2d_sincos_pos_embed(32, 4, base_size=4)
    torch.testing.assert_close(sincos_positions(rows, columns, 32), theirs.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gate", RESIDUAL_GATES)
@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_of_the_diffusion_loss_reach_everything(gate: Any, router: Any) -> None:
    model = micro(router=router, residual_gate=gate).train()
    latents, timestep, labels = inputs()
    model(latents, timestep, labels, tail_drop=[0.0, 0.3, 0.6]).sample.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert without == []


def test_smoothing_can_be_left_out_and_matters() -> None:
    latents, timestep, labels = inputs()
    with torch.no_grad():
        a, b = (micro(smoothing=s)(latents, timestep, labels, token_budget=7).sample for s in (1.0, None))
    assert not torch.allclose(a, b)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        model = micro(class_dropout_prob=0.0)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        model(*inputs(), tail_drop=0.4).sample.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype: torch.dtype) -> None:
    model = micro().to(dtype)
    latents, timestep, labels = inputs()
    with torch.no_grad():
        output = model(latents.to(dtype), timestep, labels, tail_drop=0.3)
    assert output.sample.dtype == dtype and bool(torch.isfinite(output.sample).all())


def test_save_and_load(tmp_path: Path) -> None:
    model = micro(router="cosine", smoothing=None)
    model.save_pretrained(tmp_path)
    again = DCDiTTransformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs()).sample, again(*inputs()).sample, rtol=1e-5, atol=1e-5)
    assert again.config.router == "cosine" and again.config.smoothing is None


def test_stock_pipeline_takes_it() -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    model = micro(num_classes=1000)  # the stock pipeline's unconditional label is 1000
    pipe = DiTPipeline(model, vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe([1, 2], num_inference_steps=3, generator=generator, output_type="np").images
    assert images.shape == (2, 8, 8, 3)


@pytest.mark.slow
def test_blocks_compile_without_a_break_for_changing_lengths() -> None:
    """The same graph serves every length: after the first two, nothing is compiled again."""
    import torch._dynamo

    torch._dynamo.reset()
    model = micro()
    latents, timestep, labels = inputs(2, 12, 12)
    with torch.no_grad():
        expected = [model(latents, timestep, labels, tail_drop=[0.1 * i, 0.05 * i]).sample for i in range(8)]
        model.compile_repeated_blocks(fullgraph=True, dynamic=True)
        for i in range(3):
            model(latents, timestep, labels, tail_drop=[0.1 * i, 0.05 * i])
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for i, target in enumerate(expected):
            output = model(latents, timestep, labels, tail_drop=[0.1 * i, 0.05 * i]).sample
            torch.testing.assert_close(output, target, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
