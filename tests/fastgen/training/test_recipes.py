"""The recipes: shortened runs of the committed commands really train and export models that stock classes load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from short_recipes import build_recipe, train_config
from tiny_pipelines import loaded

from fastgen.cli.main import run
from fastgen.training.engine import Trainer
from fastgen.training.recipes import RECIPES


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def _short(name: str, folder: Path, part: Path | None = None, init: Path | None = None, **overrides: object) -> Path:
    values: dict[str, object] = {"steps": 12, "batch_size": 4, "warmup": 2, "log_every": 1, "lr": 2e-3, **overrides}
    Trainer(build_recipe(name, 0, part, init), train_config(name, folder, **values)).run()
    losses = _losses(folder)
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3]), losses
    return folder / "model"


@pytest.fixture(scope="module", autouse=True)
def _few_held_out() -> Iterator[None]:
    """Short runs are measured on few pictures."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("vae", "vq"):
            patch.setattr(f"fastgen.training.{module}.HELD_OUT", 32)
        yield


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _short("vae", tmp_path_factory.mktemp("vae")) / "vae"


@pytest.fixture(scope="module")
def vq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _short("vq", tmp_path_factory.mktemp("vq")) / "vq"


def test_vae_latents_are_scaled_to_unit_deviation(vae: Path) -> None:
    from diffusers import AutoencoderKL

    from fastgen.data.shapes import ShapesWorld
    from fastgen.training.vae import to_pixels

    model = AutoencoderKL.from_pretrained(vae)
    pixels = to_pixels(torch.from_numpy(ShapesWorld(42).batch(32).images))
    with torch.no_grad():
        latents = model.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0))
    scaled = (latents - model.config.shift_factor) * model.config.scaling_factor
    assert abs(float(scaled.mean())) < 0.1 and abs(float(scaled.std()) - 1) < 0.15


def test_vq_codes_are_unit_vectors_and_stock_encode_agrees(vq: Path) -> None:
    """Stock Janus encodes by Euclidean distance to raw codes and decodes normalised ones: ours satisfy both."""
    from transformers.models.janus.modeling_janus import JanusVQVAE

    from fastgen.data.shapes import ShapesWorld
    from fastgen.training.vae import to_pixels
    from fastgen.training.vq import VqModule

    model = JanusVQVAE.from_pretrained(vq)
    codes = model.quantize.embedding.weight
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(512), rtol=0, atol=1e-5)
    pixels = to_pixels(torch.from_numpy(ShapesWorld(43).batch(8).images))
    with torch.no_grad():
        stock = model.encode(pixels, return_dict=True).image_tokens.view(8, 16, 16)
        module = VqModule(model)
        agree = (module.nearest(module.encode(pixels)) == stock).float().mean()
    assert agree > 0.999
    record = json.loads((vq.parent / "training.json").read_text())["vq"]
    assert 0 < record["code_use"] <= 1 and record["config"]["steps"] == 12


def test_dead_codes_come_back() -> None:
    """Codes that win nothing are moved onto data: after a few updates every code is used."""
    recipe = build_recipe("vq", 0)
    module = recipe.build()
    vectors = torch.nn.functional.normalize(torch.randn(4096, 8), dim=-1)
    with torch.no_grad():
        module.model.quantize.embedding.weight.copy_(module.model.quantize.embedding.weight[:1].expand(512, 8))  # type: ignore[union-attr, index]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        module.update_codes(vectors, module.nearest(vectors), generator)  # type: ignore[operator]
    assert len(module.nearest(vectors).unique()) > 400  # type: ignore[operator]


def test_z_image_trains_and_loads_with_stock_diffusers(vae: Path, tmp_path: Path) -> None:
    from diffusers import ZImagePipeline

    model = _short("z-image", tmp_path / "first", vae, steps=8)
    pipe = loaded(ZImagePipeline, model)
    image = pipe("a red circle", height=64, width=64, num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert set(json.loads((model / "training.json").read_text())) == {"vae", "z-image"}
    # Going on from it starts where it ended, not from random weights.
    first = _losses(tmp_path / "first")[-3:]
    trainer = Trainer(
        build_recipe("z-image", 0, None, model), train_config("z-image", tmp_path / "more", steps=1, batch_size=4)
    )
    trainer.run()
    again = json.loads((tmp_path / "more" / "log.jsonl").read_text().splitlines()[0])["loss"]
    assert again < 1.25 * max(first)


@pytest.mark.slow
def test_small_grows_from_the_embedded_tiny_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few steps at 128x128: exported as a stock pipeline that draws that size, and resumed bit for bit."""
    from diffusers import ZImagePipeline

    monkeypatch.setattr("fastgen.training.small_z_image.HELD_OUT", 4)
    command = ["train", "small", "--part", "tiny", "--batch-size", "2", "--precision", "fp32", "--json", "--steps"]
    assert run([*command, "2", "-o", str(tmp_path / "once")]) == 0
    assert run([*command, "1", "-o", str(tmp_path / "twice")]) == 0
    assert run([*command, "2", "-o", str(tmp_path / "twice")]) == 0
    capsys.readouterr()
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["module"] for name in ("once", "twice")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert json.loads((tmp_path / "once/model/fastgen.json").read_text())["height"] == 128
    pipe = ZImagePipeline.from_pretrained(tmp_path / "once/model", torch_dtype=torch.float32)
    assert type(pipe.transformer).__name__ == "ZImageTransformer2DModel" and len(pipe.transformer.layers) == 8
    assert pipe.scheduler.config.shift == 4.0
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle", height=128, width=128, num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (128, 128, 3)
    # The grown model begins as a guess from the tiny one, far below the variance of the target, which is about 2.
    first = json.loads((tmp_path / "once/log.jsonl").read_text().splitlines()[0])
    assert first["velocity"] < 1.0


@pytest.mark.slow
def test_a_drafter_trains_on_the_embedded_janus(tmp_path: Path) -> None:
    from fastgen.drafters.eagle import EagleDrafter
    from fastgen.pipelines.loading.checkpoint import embedded_folder

    model = _short("drafter", tmp_path / "first", embedded_folder("tiny-janus"), steps=8, batch_size=4, accumulate=1)
    first = [json.loads(line)["overlap_1"] for line in (tmp_path / "first" / "log.jsonl").read_text().splitlines()]
    assert sum(first[-3:]) > sum(first[:3])
    drafter = EagleDrafter.from_pretrained(model)
    assert drafter.config.hidden_size == 256 and drafter.config.vocab_size == 512
    trainer = Trainer(
        build_recipe("drafter", 0, embedded_folder("tiny-janus"), model),
        train_config("drafter", tmp_path / "more", steps=1, batch_size=4, accumulate=1),
    )
    trainer.run()
    again = json.loads((tmp_path / "more" / "log.jsonl").read_text().splitlines()[0])["loss"]
    assert again < 0.97 * _losses(tmp_path / "first")[0]


@pytest.mark.slow
def test_janus_trains_and_generates_with_stock_transformers(vq: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, JanusForConditionalGeneration

    model = _short("janus", tmp_path, vq, steps=8)
    janus = JanusForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(["a red circle" + tokenizer.boi_token], return_tensors="pt")
    torch.manual_seed(0)
    tokens = janus.generate(**inputs, generation_mode="image", do_sample=True)
    assert tokens.shape == (1, 256) and int(tokens.max()) < 512
    assert janus.decode_image_tokens(tokens).shape == (1, 64, 64, 3)
    record = json.loads((model / "training.json").read_text())["janus"]
    assert 0 < record["background_entropy_bits"] <= 9.01


def test_training_logits_equal_step_by_step_decoding(vq: Path) -> None:
    """Teacher-forced logits under left padding equal the stock model's with a cache, token by token."""
    recipe = build_recipe("janus", 3, vq)
    module = recipe.build().eval()
    inner = recipe.model.model  # type: ignore[attr-defined]
    texts = ["a circle<begin_of_image>", "a red circle left of a blue star<begin_of_image>"]
    prompt = recipe.tokenizer(texts, padding=True, return_tensors="pt")  # type: ignore[attr-defined]
    tokens = torch.randint(512, (2, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        names = ("patch_shapes", "patch_colors", "next_shapes", "next_colors", "early")
        labels = {name: torch.zeros_like(tokens) for name in names}
        labels["caption"] = torch.zeros(*prompt.input_ids.shape, 6, dtype=torch.int64)
        whole = module(prompt.input_ids, prompt.attention_mask, tokens, labels)[0]
        embeds = inner.language_model.embed_tokens(prompt.input_ids)
        mask, cache = prompt.attention_mask, None
        for index in range(6):
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
            output = inner.language_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            logits = inner.generation_head(output.last_hidden_state[:, -1])
            torch.testing.assert_close(whole[:, index], logits, rtol=1e-3, atol=1e-4)
            embeds = inner.generation_aligner(inner.generation_embeddings(tokens[:, index : index + 1]))
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)


def test_caption_dropout_builds_the_stock_unconditional_row(vq: Path) -> None:
    recipe = build_recipe("janus", 0, vq)
    batch = recipe.batch(0, 256, torch.Generator().manual_seed(0))
    tokenizer = recipe.tokenizer  # type: ignore[attr-defined]
    keep = {tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<begin_of_image>"), tokenizer.pad_token_id}
    dropped = torch.tensor([set(row.tolist()) <= keep for row in batch["input_ids"]])
    assert 8 <= int(dropped.sum()) <= 50  # 10 % of 256; outside with probability < 1e-4
    # Captions of one object are dropped five times as often: 25 % of 26 % of 2,560 against 5 % of 74 %.
    counts = {True: 0, False: 0}
    for start in range(0, 2560, 256):
        batch = recipe.batch(start, 256, torch.Generator().manual_seed(start))
        captions = recipe.data.batch(256, start).captions  # type: ignore[attr-defined]
        for row, caption in zip(batch["input_ids"].tolist(), captions, strict=True):
            counts[caption.tag in ("single_object", "colors")] += set(row) <= keep
    assert counts[True] > 1.2 * counts[False] > 0
    assert (batch["attention_mask"][dropped].sum(dim=1) > 3).all()  # dropped words stay attended to


def test_detector_loss_of_pictures_without_objects_is_finite() -> None:
    recipe = build_recipe("detector", 0)
    module, generator = recipe.build(), torch.Generator().manual_seed(0)
    batch = recipe.batch(0, 4, generator)
    batch["owner"].fill_(-1)
    loss, logs = recipe.loss(module, batch, generator)
    loss.backward()
    assert torch.isfinite(loss) and logs["shape_accuracy"] == 0.0


def test_detector_learns_and_loads(tmp_path: Path) -> None:
    from fastgen.models.shapes_detector import ShapesDetector

    model = _short("detector", tmp_path, steps=15, batch_size=8)
    assert ShapesDetector.from_pretrained(model).config.feature_dim == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mystery", "-o", "x"], "No such command 'mystery'"),
        (["z-image", "-o", "x"], "needs --part"),
        (["vae", "-o", "x", "--steps", "0"], "--steps: 0 is not allowed"),
        (["vae", "-o", "x", "--lr", "-1"], "--lr: -1.0 is not allowed"),
        (["vae", "-o", "x", "--part", "."], "No such option: --part"),
        (["detector", "-o", "x", "--init", "."], "No such option: --init"),
        (["janus", "-o", "x", "--part", "nowhere"], "holds no model"),
    ],
)
def test_bad_commands_end_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_command_line_trains_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "detector", "-o", str(tmp_path / "run"), "--batch-size", "4", "--json"]
    assert run([*command, "--steps", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["steps_done"] == 2
    assert run([*command, "--steps", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["items_seen"] == 12


def test_recipes_have_these_names() -> None:
    assert set(RECIPES) == {
        *("vae", "vq", "detector", "verifier", "z-image", "small", "janus"),
        *("drafter", "heads", "dc-patch", "dc-graft", "dc-finetune"),
    }


@pytest.mark.slow
def test_two_processes_train_one_model(vae: Path, vq: Path, tmp_path: Path) -> None:
    """Under torchrun each process sees its own items and all end with the same weights, code book included."""
    script = Path(__file__).parents[2] / "helpers" / "train_together.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path), str(vae), str(vq)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("one model") == len(RECIPES)
