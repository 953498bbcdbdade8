"""A grown Z-Image computes what the one it was grown from computes."""

from __future__ import annotations

import pytest
import torch
from diffusers import ZImageTransformer2DModel

from fastgen.models.tiny_z_image import TEXT_WIDTH, build_transformer
from fastgen.training.small_z_image import grow, source_blocks


@pytest.fixture(scope="module")
def trained() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    model = build_transformer().eval()
    for parameter in model.parameters():  # zero pad tokens and near-closed gates would hide differences
        torch.nn.init.normal_(parameter, std=0.08)
    return model


def run(model: ZImageTransformer2DModel, side: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 1, side, side, generator=generator)
    captions = [torch.randn(length, TEXT_WIDTH, generator=generator) for length in (5, 13)]
    with torch.no_grad():
        return torch.stack(model(list(latents), torch.tensor([0.2, 0.9]), captions, return_dict=False)[0])


@pytest.mark.parametrize("layers", [5, 6, 8, 10, 13])
def test_more_blocks_compute_the_same_bit_for_bit(trained: ZImageTransformer2DModel, layers: int) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    grown = grow(trained, layers).eval()
    assert type(grown) is ZImageTransformer2DModel and len(grown.layers) == layers
    for side in (16, 32):
        assert torch.equal(run(grown, side), run(trained, side))
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_new_blocks_can_learn(trained: ZImageTransformer2DModel) -> None:
    """Closed gates get a gradient, and once they are open so does the rest of the block."""
    grown = grow(trained, 8)
    new = [block for block, (_, closed) in zip(grown.layers, source_blocks(5, 8), strict=True) if closed]
    assert len(new) == 3
    latents, captions = list(torch.randn(1, 16, 1, 16, 16)), [torch.randn(5, TEXT_WIDTH)]

    def gradients() -> None:
        grown.zero_grad()
        grown(latents, torch.tensor([0.3]), captions, return_dict=False)[0][0].square().mean().backward()

    gradients()
    for block in new:
        bias = block.adaLN_modulation[0].bias
        assert all(gate.abs().max() > 0 for gate in bias.grad.chunk(4)[1::2])
        assert block.attention.to_q.weight.grad.abs().max() == 0
        with torch.no_grad():
            bias -= 0.1 * bias.grad / bias.grad.abs().max()
    gradients()
    assert all(block.attention.to_q.weight.grad.abs().max() > 0 for block in new)


def test_another_base_of_the_rotary_frequencies_changes_positions_alone(trained: ZImageTransformer2DModel) -> None:
    grown = grow(trained, 5, rope_theta=1000.0)
    assert grown.config.rope_theta == 1000.0 and trained.config.rope_theta == 256.0
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in grown.state_dict().items())
    assert not torch.equal(run(grown), run(trained))


def test_half_precision_stays(trained: ZImageTransformer2DModel) -> None:
    half = build_transformer().to(torch.bfloat16)
    assert {parameter.dtype for parameter in grow(half, 6).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("layers", [0, 4, -1])
def test_fewer_blocks_are_refused(trained: ZImageTransformer2DModel, layers: int) -> None:
    with pytest.raises(ValueError, match=f"at least the 5 blocks of the trained model, got {layers}"):
        grow(trained, layers)


@pytest.mark.parametrize(("old", "new"), [(1, 1), (1, 4), (5, 8), (8, 30), (30, 31)])
def test_every_old_block_comes_once_open_and_in_order(old: int, new: int) -> None:
    sources = source_blocks(old, new)
    assert len(sources) == new
    assert [source for source, closed in sources if not closed] == list(range(old))
    assert [source for source, _ in sources] == sorted(source for source, _ in sources)
