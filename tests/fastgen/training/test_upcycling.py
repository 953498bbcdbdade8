"""Both stages of upcycling, on a Z-Image and on a DiT, from their own samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, ZImagePipeline
from tiny_pipelines import loaded

from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.models.upcycle import backbone_names, upcycle
from fastgen.training.engine import Trainer
from fastgen.training.families import family_of
from fastgen.training.samples import Samples, draw_samples
from fastgen.training.train_config import TrainConfig
from fastgen.training.upcycling import FinetuneRecipe, GraftRecipe, graft_losses, load_student

PROMPTS = ["a red circle", "two blue squares", "a green star above a white ring"]
SIZE = {"height": 16, "width": 16, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def z(micro_z: Path) -> ZImagePipeline:
    return loaded(ZImagePipeline, micro_z)


@pytest.fixture(scope="module")
def dit() -> DiTPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8, scaling_factor=1.0
    )
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=4, out_channels=8, sample_size=8
    )
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    pipe = DiTPipeline(model.eval(), vae.eval(), DDIMScheduler(num_train_timesteps=1000))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def z_samples(z: ZImagePipeline, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return draw_samples(z, tmp_path_factory.mktemp("z"), PROMPTS, 70, batch_size=16, **SIZE)


@pytest.fixture(scope="module")
def dit_samples(dit: DiTPipeline, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return draw_samples(dit, tmp_path_factory.mktemp("dit"), range(1000), 40, batch_size=20, num_inference_steps=2)


@pytest.fixture(params=["z", "dit"])
def case(request: pytest.FixtureRequest) -> tuple[Any, Samples]:
    return request.getfixturevalue(request.param), request.getfixturevalue(f"{request.param}_samples")


def train(recipe: Any, folder: Path, **settings: Any) -> list[dict[str, float]]:
    values = {"steps": 12, "batch_size": 8, "lr": 2e-3, "warmup": 2, "log_every": 1, **settings}
    Trainer(recipe, TrainConfig(output_dir=folder, precision="fp32", **values)).run()
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --- samples -----------------------------------------------------------------------------------------------------


def test_samples_are_the_pipelines_own(z: ZImagePipeline, z_samples: Samples) -> None:
    """Sample k: prompt k mod 3, generator seeded with k, whatever the batch; in half precision."""
    stored = {}
    for start in range(0, 70):
        latents, labels = z_samples.batch(start, 1)
        stored[tuple(latents.flatten()[:4].tolist())] = (latents[0], labels[0])
    assert len(stored) == 70  # one pass shows every sample once
    for k in (0, 4, 65):
        generator = torch.Generator().manual_seed(k)
        alone = z(PROMPTS[k % 3], generator=generator, output_type="latent", **SIZE).images[0]
        latents, label = stored[tuple(alone.half().float().flatten()[:4].tolist())]
        assert label == PROMPTS[k % 3]
        torch.testing.assert_close(latents, alone, rtol=2e-3, atol=2e-3)


def test_every_pass_has_an_order_of_its_own(z_samples: Samples) -> None:
    first, second = (z_samples.batch(turn * 70, 70)[0] for turn in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first.flatten(1).sum(1).sort().values, second.flatten(1).sum(1).sort().values)
    assert torch.equal(z_samples.batch(65, 10)[0], torch.cat([first[65:], second[:5]]))


def test_interrupted_drawing_continues(z: ZImagePipeline, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_samples(z, tmp_path / "a", PROMPTS, 66, batch_size=33, report=stop, **SIZE)
    with pytest.raises(FastgenError, match="1 shards are missing"):
        Samples(tmp_path / "a")
    kept = (tmp_path / "a" / "00000.safetensors").stat().st_mtime_ns
    draw_samples(z, tmp_path / "a", PROMPTS, 66, batch_size=33, **SIZE)
    draw_samples(z, tmp_path / "b", PROMPTS, 66, batch_size=33, **SIZE)
    assert (tmp_path / "a" / "00000.safetensors").stat().st_mtime_ns == kept
    for name in ("00000.safetensors", "00001.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_bad_samples(z: ZImagePipeline, z_samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(FastgenError, match="other labels or settings"):
        draw_samples(z, z_samples.folder, PROMPTS[:2], 70, **SIZE)
    with pytest.raises(FastgenError, match="has no samples"):
        Samples(tmp_path)
    for bad in ({"labels": []}, {"count": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="need labels"):
            draw_samples(z, tmp_path, **{"labels": PROMPTS, "count": 3, **bad})
    with pytest.raises(ValueError, match="cannot be upcycled"):
        draw_samples(object(), tmp_path, PROMPTS, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be upcycled"):
        family_of(object())  # type: ignore[arg-type]


# --- stage 1 -----------------------------------------------------------------------------------------------------


def test_grafting_trains_the_scaffold_and_keeps_the_backbone(case: tuple[Any, Samples], tmp_path: Path) -> None:
    pipe, samples = case
    teacher = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    recipe = GraftRecipe(0, pipe, samples)
    before = {name: value.clone() for name, value in recipe.student.state_dict().items()}
    records = train(recipe, tmp_path, steps=30)
    assert sum(r["loss"] for r in records[-5:]) < 0.9 * sum(r["loss"] for r in records[:5])
    assert {"prediction", "embedded", "final", "ratio", "kept"} <= set(records[0])
    backbone = set(backbone_names(recipe.student))
    after = recipe.student.state_dict()
    assert backbone and all(torch.equal(after[name], before[name]) for name in backbone)
    assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith("scaffold.router"))
    assert all(torch.equal(value, teacher[name]) for name, value in pipe.transformer.state_dict().items())
    assert type(load_student(tmp_path / "model" / "transformer")) is type(recipe.student)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert not any("teacher" in name for name in checkpoint["module"])


def test_predictions_of_the_teacher(case: tuple[Any, Samples]) -> None:
    """Prediction, embedded patches and last tokens are those of the stock forward, for each sample alone."""
    pipe, samples = case
    family = family_of(pipe)
    latents, labels = samples.batch(0, 3)
    noisy = family.corrupt(latents, torch.Generator().manual_seed(0))
    taught = family.teach(noisy, family.conditions(labels, [False, True, False]))
    patches = latents.shape[2] * latents.shape[3] // 4
    assert taught.embedded.shape[:2] == taught.final.shape[:2] == (3, patches)
    for i, dropped in enumerate((False, True, False)):
        one = type(noisy)(*(getattr(noisy, name)[i : i + 1] for name in ("latents", "level", "start", "noise")))
        alone = family.teach(one, family.conditions(labels[i : i + 1], [dropped]))
        for name in ("prediction", "embedded", "final"):
            torch.testing.assert_close(getattr(taught, name)[i], getattr(alone, name)[0], rtol=1e-3, atol=1e-4)
    # The last projection turns the last tokens into the prediction.
    last = (
        pipe.transformer.proj_out_2
        if isinstance(pipe, DiTPipeline)
        else pipe.transformer.all_final_layer["2-1"].linear
    )
    with torch.no_grad():
        values = last(taught.final).sort(dim=-1).values.flatten(1).sort(dim=-1).values
    torch.testing.assert_close(values, taught.prediction.flatten(1).sort(dim=-1).values, rtol=1e-3, atol=1e-4)


def test_graft_losses_vanish_for_the_teachers_own_words(case: tuple[Any, Samples]) -> None:
    """And are positive for anything else; only kept positions count in the encoder's."""
    pipe, samples = case
    family, student = family_of(pipe), upcycle(pipe.transformer)
    latents, labels = samples.batch(0, 2)
    noisy = family.corrupt(latents, torch.Generator().manual_seed(0))
    conditions = family.conditions(labels, [False, False])
    taught = family.teach(noisy, conditions)
    prediction, output = family.predict(student, noisy, conditions, 0.3)
    losses = graft_losses(prediction, output, taught)
    assert all(float(loss.detach()) > 0.01 for loss in losses.values())
    rows, columns = output.chunks.grid

    def spread(tokens: torch.Tensor) -> torch.Tensor:
        index = torch.arange(rows)[:, None] // 2 * (columns // 2) + torch.arange(columns)[None] // 2
        return tokens[:, index.flatten()]

    output.encoded = torch.where(output.chunks.mask[..., None], spread(taught.embedded), torch.nan)
    output.decoded = spread(taught.final)
    assert all(float(loss) == 0 for loss in graft_losses(taught.prediction, output, taught).values())
    output.chunks = None
    with pytest.raises(ValueError, match="output_chunks"):
        graft_losses(prediction, output, taught)


# --- stage 2 -----------------------------------------------------------------------------------------------------


def test_finetuning_freezes_the_embeddings_alone(case: tuple[Any, Samples], tmp_path: Path) -> None:
    pipe, samples = case
    train(GraftRecipe(0, pipe, samples), tmp_path / "one", steps=2)
    recipe = FinetuneRecipe(0, pipe, samples, tmp_path / "one" / "model" / "transformer", warm_up=16)
    before = {name: value.clone() for name, value in recipe.student.state_dict().items()}
    records = train(recipe, tmp_path / "two", steps=6)
    assert all(torch.isfinite(torch.tensor(record["diffusion"])) for record in records)
    frozen = recipe.family.frozen
    parameters = dict(recipe.student.named_parameters())
    for name, parameter in parameters.items():
        same = torch.equal(parameter, before[name])
        assert same if name.split(".")[0] in frozen else (not same or parameter.grad is None), name
    assert any(name.split(".")[0] in frozen for name in parameters)
    assert sum(not torch.equal(parameters[name], before[name]) for name in parameters) > 0.8 * len(parameters)


def test_tail_drops_are_drawn_after_the_warm_up(z: ZImagePipeline, z_samples: Samples) -> None:
    recipe = FinetuneRecipe(0, z, z_samples, warm_up=40)
    generator = torch.Generator().manual_seed(0)
    assert {recipe.batch(start, 1, generator)["tail_drop"] for start in range(40)} == {0.0}
    assert len({recipe.batch(start, 1, generator)["tail_drop"] for start in range(40, 140)}) == 7


# --- command line ------------------------------------------------------------------------------------------------


def test_both_stages_by_command(micro_z: Path, tmp_path: Path) -> None:
    common = ["--part", str(micro_z), "--data", str(tmp_path / "data"), "--batch-size", "4", "--accumulate", "1"]
    common += ["--steps", "2", "--precision", "fp32", "--json"]
    draw = ["--samples", "8", "--prompts-file", "shapesworld"]
    assert run(["train", "dc-graft", "-o", str(tmp_path / "one"), *common, *draw]) == 0
    student = tmp_path / "one" / "model" / "transformer"
    assert run(["train", "dc-finetune", "-o", str(tmp_path / "two"), "--init", str(student), *common]) == 0
    assert load_student(tmp_path / "two" / "model" / "transformer").config.dim == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dc-graft"], "--part"),
        (["dc-graft", "--part", "tiny"], "--data"),
        (["dc-finetune", "--part", "tiny", "--data", "d"], "--init"),
        (["z-image", "--samples", "3"], "--samples"),
        (["vae", "--data", "d"], "--data"),
        (["dc-graft", "--part", "tiny", "--data", "d", "--samples", "2"], "--prompts-file"),
        (["dc-graft", "--part", "tiny", "--data", "d", "--samples", "2", "--prompts-file", "absent"], "absent"),
        (["dc-graft", "--part", "nobody/nothing", "--data", "d"], "nobody/nothing"),
        (["dc-graft", "--part", "tiny", "--data", "d"], "has no samples"),
        (["vae", "--precision", "fp8"], "precision"),
    ],
)
def test_bad_commands(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", *arguments, "-o", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]


def test_a_folder_without_a_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no transformer with dynamic chunking"):
        load_student(tmp_path)
