"""Recipe `dc-patch`: it begins exactly, the kept share falls slowly, and every noise level keeps its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from short_recipes import build_recipe, train_config

from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.models.chunking import select_chunks
from fastgen.models.dc_z_image import DCZImageTransformer2DModel
from fastgen.pipelines.loading.checkpoint import embedded_folder
from fastgen.training.engine import Trainer
from fastgen.training.patch_chunking import PatchRecipe, annealed, drop_cost_loss, level_loss, token_budgets


@pytest.fixture(autouse=True)
def _few_held_out() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastgen.training.patch_chunking.HELD_OUT", 4)
        yield


def test_dropping_begins_with_the_first_items_and_ends_at_the_target() -> None:
    steps = [annealed(item, 400) for item in range(0, 600, 50)]
    assert steps[0] == 0 < steps[1] and steps == sorted(steps) and steps[8:] == [1.0] * 4
    assert annealed(1, 0) == 1.0


def test_each_sample_has_a_budget_and_those_without_a_caption_the_smallest() -> None:
    dropped = torch.arange(400) % 2 == 0

    def budgets(progress: float, least: int = 8) -> tuple[list[int], list[int]]:
        drawn = token_budgets(progress, dropped, 4.0, least, 64, torch.Generator().manual_seed(0))
        return drawn[0::2], drawn[1::2]

    without, with_caption = budgets(1.0)
    assert set(with_caption) == {16, 14, 13, 11, 10, 8}
    assert min(without) == 8 and without.count(8) > 100 > with_caption.count(8)
    assert min(budgets(1.0, 1)[0]) == 1 and min(budgets(1.0, 1)[1]) == 6
    assert set(sum(budgets(0.0), [])) == {64}
    # Half way there every sample has dropped half of what it is to drop.
    half = sum(budgets(0.5), [])
    assert (max(half), min(half)) == (40, 36)


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
    assert first["kept"] == 1.0 > first["share"] > 0.999 and first["velocity"] < 1e-3
    assert json.loads((once / "model/fastgen.json").read_text())["height"] == 64
    again = PatchRecipe(0, embedded_folder("tiny"), once / "model/transformer")
    assert again.transformer.config.grid == "patch"


def test_a_transformer_of_the_other_grid_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "DCZImageTransformer2DModel"}))
    with pytest.raises(FastgenError, match="grid 'latent', recipe dc-patch needs 'patch'"):
        PatchRecipe(0, embedded_folder("tiny"), tmp_path)


def test_budgets_fall_with_the_share() -> None:
    recipe = PatchRecipe(0, embedded_folder("tiny"), anneal=100)
    generator = torch.Generator().manual_seed(0)
    drawn = [recipe.batch(start, 40, generator) for start in (0, 20, 200)]
    # It falls from group to group of 16 items, wherever a batch begins and ends.
    expected = [1 - min(1.0, (item // 16 + 1) * 0.16) * 0.75 for item in (*range(60), *range(200, 240))]
    assert sum([batch["share"] for batch in drawn], []) == pytest.approx([*expected[:40], *expected[20:]])
    assert [max(batch["token_budget"]) for batch in drawn] == [56, 49, 16]  # of 8 x 8 patches
    assert min(drawn[2]["token_budget"]) == 8  # the floor, an eighth
    lower = PatchRecipe(0, embedded_folder("tiny"), anneal=0, floor=0.0, compression=8.0)
    assert min(lower.batch(9, 40, generator)["token_budget"]) == 1
    assert isinstance(recipe.transformer, DCZImageTransformer2DModel)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("anneal=-1", "anneal: -1 is not allowed"),
        ("cost=no", "cost: 'no' is not allowed"),
        ("floor=2", "floor: "),
        ("grid=latent", "needs grid 'patch'"),
        ("grit=1", "unexpected keyword argument 'grit'"),
        ("n_last_layers=99", "n_last_layers: needs 0 to"),
    ],
)
def test_an_unknown_choice_is_refused(choice: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "dc-patch", "--part", "tiny", "-o", "nowhere", "--set", choice]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error
