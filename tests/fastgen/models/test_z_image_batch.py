"""The batched Z-Image forward equals the stock one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.models.tiny_z_image import TEXT_WIDTH, build_transformer
from fastgen.models.z_image_batch import forward_batch


@pytest.fixture(scope="module")
def transformer() -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_transformer().eval()
    for parameter in model.parameters():  # zero pad tokens and near-closed gates would hide differences
        torch.nn.init.normal_(parameter, std=0.08)
    return model


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    size=st.sampled_from([(16, 16), (8, 32), (32, 16)]),
    seed=st.integers(0, 10**6),
)
def test_equals_stock_forward(
    transformer: torch.nn.Module, lengths: list[int], size: tuple[int, int], seed: int
) -> None:
    """Captions on both sides of the 32-token padding limit, non-square images, garbage in the padding."""
    lengths = [length if max(lengths) <= 32 else max(length, 33) for length in lengths]
    torch.manual_seed(seed)
    latents = torch.randn(len(lengths), 16, *size)
    timestep = torch.rand(len(lengths))
    caption = torch.randn(len(lengths), max(lengths), TEXT_WIDTH) * 3
    with torch.no_grad():
        stock = transformer(
            [latent[:, None] for latent in latents],
            timestep,
            [rows[:length] for rows, length in zip(caption, lengths, strict=True)],
            return_dict=False,
        )[0]
        ours = forward_batch(transformer, latents, timestep, caption, torch.tensor(lengths))[0]  # type: ignore[arg-type]
    torch.testing.assert_close(ours, torch.stack(stock).squeeze(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(15, 16), (16, 15), (4, 4)])
def test_sizes_that_are_not_whole_patches_are_refused(transformer: torch.nn.Module, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiple of 32 patches"):
        forward_batch(
            transformer,  # type: ignore[arg-type]
            torch.zeros(1, 16, *size),
            torch.zeros(1),
            torch.zeros(1, 3, TEXT_WIDTH),
            torch.tensor([3]),
        )


def test_gradients_equal_stock(transformer: torch.nn.Module) -> None:
    torch.manual_seed(1)
    latents, caption, timestep = torch.randn(2, 16, 16, 16), torch.randn(2, 9, TEXT_WIDTH), torch.rand(2)
    parameters = [p for name, p in transformer.named_parameters() if "layers.0" in name or "cap_embedder" in name]
    stock = torch.stack(transformer([x[:, None] for x in latents], timestep, list(caption), return_dict=False)[0])
    first = torch.autograd.grad(stock.square().mean(), parameters)
    ours = forward_batch(transformer, latents, timestep, caption, torch.tensor([9, 9]))[0]  # type: ignore[arg-type]
    second = torch.autograd.grad(ours.square().mean(), parameters)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
