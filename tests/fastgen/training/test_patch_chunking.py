"""Recipe `dc-patch`: it begins exactly, the kept share falls slowly, and every noise level keeps its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastgen.errors import FastgenError
from fastgen.models.chunking import select_chunks
from fastgen.models.dc_z_image import DCZImageTransformer2DModel
from fastgen.pipelines.loading.checkpoint import embedded_folder
from fastgen.training.engine import Trainer
from fastgen.training.patch_chunking import PatchRecipe, drop_cost_loss, level_loss, wanted_share
from fastgen.training.recipes import build_recipe, train_config


@pytest.fixture(autouse=True)
def _few_held_out() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastgen.training.patch_chunking.HELD_OUT", 4)
        yield


def test_the_wanted_share_falls_from_all_to_the_target() -> None:
    shares = [wanted_share(start, 100, 400, 4.0) for start in range(0, 700, 50)]
    assert shares[:3] == [1.0, 1.0, 1.0] and shares[-4:] == [0.25] * 4
    assert shares == sorted(shares, reverse=True) and wanted_share(300, 100, 400, 4.0) == 0.625
    assert wanted_share(1, 0, 0, 8.0) == 0.125


def test_no_noise_level_saves_for_another() -> None:
    """The share is right on average and wrong at both ends: bands by level move both, one band of all moves none."""
    sigma = torch.tensor([0.9, 0.1, 0.95, 0.05, 0.85, 0.15, 0.99, 0.01])
    noisy = sigma > 0.5
    logits = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 0.5
    logits[noisy] -= 1.2
    logits[~noisy] += 1.2
    for band, moved in ((4, True), (8, False)):
        offsets = torch.zeros(8, 1, requires_grad=True)
        loss = level_loss(torch.sigmoid(logits + offsets), sigma, 0.5, band)
        loss.backward()
        assert (float(loss.detach()) > 0.5) == moved
        if moved:
            assert offsets.grad is not None
            assert offsets.grad[noisy].sum() < 0 < offsets.grad[~noisy].sum()  # noisy ones shall keep more


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.8])
def test_the_threshold_settles_where_the_share_is_right(share: float) -> None:
    logits = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) + 1.5
    sigma, offset = torch.rand(8), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([offset], lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        level_loss(torch.sigmoid(logits + offset), sigma, share, 8).backward()
        optimizer.step()
    assert ((logits + offset) > 0).float().mean().item() == pytest.approx(share, abs=0.01)


def test_where_all_is_wanted_the_threshold_stays() -> None:
    assert float(level_loss(torch.full((4, 8), 0.8), torch.rand(4), 1.0)) == 0


def test_patches_that_were_missed_most_become_likelier() -> None:
    p = torch.tensor([[0.9, 0.4, 0.3, 0.2], [0.8, 0.7, 0.1, 0.2]]).requires_grad_(True)
    chunks = select_chunks(p, (2, 2))
    error = torch.tensor([[7.0, 5.0, 1.0, 0.0], [9.0, 9.0, 2.0, 2.0]], requires_grad=True)
    drop_cost_loss(chunks, error).backward()
    assert error.grad is None and p.grad is not None
    assert p.grad[0, 1] < 0 < p.grad[0, 2] < p.grad[0, 3]
    assert p.grad[0, 0] == 0 and (p.grad[1] == 0).all()  # kept ones, and equal ones
    whole = select_chunks(torch.ones(1, 4), (2, 2))
    assert float(drop_cost_loss(whole, torch.rand(1, 4))) == 0


def test_it_begins_as_its_teacher_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    def train(folder: str, steps: int) -> Path:
        config = train_config("dc-patch", tmp_path / folder, steps=steps, batch_size=2, accumulate=1, log_every=1)
        Trainer(build_recipe("dc-patch", 0, embedded_folder("tiny")), config).run()
        return tmp_path / folder

    once = train("once", 2)
    train("twice", 1)
    twice = train("twice", 2)
    states = [torch.load(folder / "checkpoint.pt", weights_only=True)["module"] for folder in (once, twice)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    first = json.loads((once / "log.jsonl").read_text().splitlines()[0])
    assert first["kept"] == first["share"] == 1.0 and first["velocity"] < 1e-3
    assert json.loads((once / "model/fastgen.json").read_text())["height"] == 64
    again = PatchRecipe(0, embedded_folder("tiny"), once / "model/transformer")
    assert again.transformer.config.grid == "patch"


def test_a_transformer_of_the_other_grid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FastgenError, match="grid 'latent', recipe dc-patch needs 'patch'"):
        PatchRecipe(0, embedded_folder("tiny"), embedded_folder("tiny-dc") / "transformer")


def test_budgets_fall_with_the_share() -> None:
    recipe = PatchRecipe(0, embedded_folder("tiny"), warm_up=10, anneal=10)
    generator = torch.Generator().manual_seed(0)
    drawn = [[recipe.batch(start, 1, generator)["token_budget"] for _ in range(40)] for start in (5, 15, 30)]
    assert set(drawn[0]) == {64}  # 8 x 8 patches, all of them
    assert (max(drawn[1]), min(drawn[1])) == (40, 16)
    assert (max(drawn[2]), min(drawn[2])) == (16, 8)  # not below the floor, an eighth
    lower = PatchRecipe(0, embedded_folder("tiny"), warm_up=0, anneal=0, floor=0.0)
    assert min(lower.batch(9, 1, generator)["token_budget"] for _ in range(40)) == 6
    assert isinstance(recipe.transformer, DCZImageTransformer2DModel)
