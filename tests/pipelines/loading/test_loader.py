"""load_pipeline and generate_images: one interface for both kinds of model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ZImagePipeline
from micro_models import PROMPTS
from safetensors.torch import load_file, save_file

from fastgen.errors import FastgenError
from fastgen.pipelines.generation import Progress, generate_images, unknown_words
from fastgen.pipelines.janus import JanusImagePipeline
from fastgen.pipelines.loading import load_pipeline, resolve_device


@pytest.fixture(scope="module")
def z_pipe(micro_z: Path) -> DiffusionPipeline:
    return load_pipeline(str(micro_z))


@pytest.fixture(scope="module")
def janus_pipe(micro_janus: Path) -> DiffusionPipeline:
    return load_pipeline(str(micro_janus))


@pytest.fixture(params=["z", "janus"])
def pipe(request: pytest.FixtureRequest) -> DiffusionPipeline:
    return request.getfixturevalue(f"{request.param}_pipe")


def pixels(pipe: DiffusionPipeline, prompts: list[str], seeds: list[int], **options: Any) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(picture.image)) for picture in generate_images(pipe, prompts, seeds, **options)]


def test_classes_and_types(z_pipe: DiffusionPipeline, janus_pipe: DiffusionPipeline) -> None:
    assert isinstance(z_pipe, ZImagePipeline) and isinstance(janus_pipe, JanusImagePipeline)
    for network in (z_pipe.transformer, z_pipe.vae, z_pipe.text_encoder, janus_pipe.model):
        assert network.dtype == torch.float32 and not network.training


def test_same_pixels_for_any_batch_size_and_order(pipe: DiffusionPipeline) -> None:
    seeds = [7, 8, 9, 10, 11, 12, 13, 14]
    alone = pixels(pipe, PROMPTS, seeds, batch_size=1)
    for size in (2, 3, 5, 8):
        assert all(map(torch.equal, pixels(pipe, PROMPTS, seeds, batch_size=size), alone))
    order = [5, 2, 7, 0]
    mixed = pixels(pipe, [PROMPTS[i] for i in order], [seeds[i] for i in order], batch_size=3)
    assert all(torch.equal(picture, alone[i]) for picture, i in zip(mixed, order, strict=True))
    assert len({picture.numpy().tobytes() for picture in alone}) == len(alone)


def test_a_folder_next_to_a_base_has_its_own_scheduler_and_no_other_parts(micro_z: Path, tmp_path: Path) -> None:
    (tmp_path / "fastgen.json").write_text(json.dumps({"base": str(micro_z)}))
    for name in ("model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(micro_z / name, tmp_path / name)
    assert torch.equal(*(pixels(load_pipeline(str(folder)), PROMPTS[:1], [0])[0] for folder in (tmp_path, micro_z)))
    shutil.copytree(micro_z / "scheduler", tmp_path / "scheduler")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    shift = load_pipeline(str(micro_z)).scheduler.config.shift
    file.write_text(json.dumps({**json.loads(file.read_text()), "shift": 2 * shift}))
    assert load_pipeline(str(tmp_path)).scheduler.config.shift == 2 * shift
    shutil.copytree(micro_z / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(FastgenError, match="only networks and the scheduler may differ"):
        load_pipeline(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "tiny-janus", "small", "small-dc"])
def test_embedded_models_give_the_same_pixels_for_any_batch_size(model: str) -> None:
    """Trained weights are the hard case: large logits, and decisions closer to each other than in a random model."""
    pipe, seeds = load_pipeline(model), list(range(8))
    options = {"steps": 4} if model == "tiny" else {}
    alone = pixels(pipe, PROMPTS, seeds, batch_size=1, **options)
    for size in (2, 3, 5, 8):
        assert all(
            map(torch.equal, pixels(pipe, PROMPTS, seeds, batch_size=size, batch_invariant=True, **options), alone)
        )


def test_equals_the_stock_call(z_pipe: DiffusionPipeline) -> None:
    """generate_images adds nothing: the stock pipeline with the same generator gives the same picture."""
    (ours,) = generate_images(z_pipe, ["a red circle"], [5])
    stock = z_pipe(
        prompt=["a red circle"],
        height=16,
        width=16,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert np.array_equal(np.asarray(ours.image), np.asarray(stock))


def test_fast_batches_agree_up_to_rounding(z_pipe: DiffusionPipeline) -> None:
    seeds = list(range(8))
    alone = pixels(z_pipe, PROMPTS, seeds)
    batch = pixels(z_pipe, PROMPTS, seeds, batch_size=8, batch_invariant=False)
    assert max(int((a.int() - b.int()).abs().max()) for a, b in zip(alone, batch, strict=True)) <= 1


def test_settings_reach_the_pipeline(z_pipe: DiffusionPipeline) -> None:
    base = pixels(z_pipe, ["a ring"], [0])[0]
    for change in ({"steps": 3}, {"guidance_scale": 4.0}, {"negative_prompt": "red"}):
        assert not torch.equal(pixels(z_pipe, ["a ring"], [0], **change)[0], base), change
    assert pixels(z_pipe, ["a ring"], [0], height=24, width=8)[0].shape == (24, 8, 3)
    assert torch.equal(pixels(z_pipe, ["a ring"], [0], steps=2, guidance_scale=2.0)[0], base)  # fastgen.json


def test_stats_and_progress(pipe: DiffusionPipeline) -> None:
    seen: list[Progress] = []
    pictures = list(
        generate_images(
            pipe, PROMPTS[:3], [1, 2, 3], batch_size=2, callback=seen.append, flops=True, batch_invariant=True
        )
    )
    assert [(p.prompt, p.seed) for p in pictures] == list(zip(PROMPTS[:3], [1, 2, 3], strict=True))
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    stats, images = pictures[0].stats, pictures[0].images
    assert stats.flops > 0 and stats.seconds["decode"] > 0
    assert json.loads(json.dumps(pictures[0].record))["images"] == images
    if isinstance(pipe, JanusImagePipeline):
        assert images == 2 and stats.passes["target"] >= 16 and stats.seconds["tokens"] > 0
    else:
        # One picture at a time: 2 steps of 2 rows (with and without the prompt).
        assert images == 1 and stats.passes == {"denoiser": 2} and stats.nfe == 4
        assert stats.seconds["denoise"] > 0 and stats.seconds["text"] > 0
        assert stats.paths["batch"]


def test_the_pipeline_is_left_as_it_was(pipe: DiffusionPipeline) -> None:
    prompts = ["a ring", "red"]
    pipe.set_progress_bar_config(desc="mine", disable=True)
    list(generate_images(pipe, prompts, [0, 1], batch_size=2))
    assert prompts == ["a ring", "red"]
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}
    if not isinstance(pipe, JanusImagePipeline):
        assert not pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize(
    ("prompts", "seeds", "options", "message"),
    [
        (["a"], [0, 1], {}, "2 seeds for 1 prompts"),
        ([""], [0], {}, "empty"),
        (["  "], [0], {}, "empty"),
        ([b"a"], [0], {}, "needs a text"),
        (["a\x00b"], [0], {}, "not text"),
        (["\udcff"], [0], {}, "not text"),
        (["a"], [-1], {}, "seed"),
        (["a"], [2**63], {}, "seed"),
        (["a"], [1.5], {}, "seed"),
        (["a"], [0], {"batch_size": 0}, "batch_size"),
        (["a"], [0], {"guidance_scale": float("nan")}, "guidance_scale"),
        (["a"], [0], {"guidance_scale": "2"}, "guidance_scale"),
        (["a"], [0], {"negative_prompt": 5}, "negative_prompt"),
        (["a"], [0], {"height": 20}, "height: 20"),
        (["a"], [0], {"width": 4096}, "width: 4096"),
    ],
)
def test_bad_input_is_refused_at_the_call(
    pipe: DiffusionPipeline, prompts: list[Any], seeds: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(FastgenError, match=message) as caught:
        generate_images(pipe, prompts, seeds, **options)
    assert "\n" not in str(caught.value)


def test_arguments_of_the_other_kind(z_pipe: DiffusionPipeline, janus_pipe: DiffusionPipeline) -> None:
    with pytest.raises(FastgenError, match="steps: JanusImagePipeline does not take it"):
        generate_images(janus_pipe, ["a"], [0], steps=4)
    with pytest.raises(FastgenError, match="negative_prompt: JanusImagePipeline does not take it"):
        generate_images(janus_pipe, ["a"], [0], negative_prompt="b")
    with pytest.raises(FastgenError, match="top_k: ZImagePipeline does not take it"):
        generate_images(z_pipe, ["a"], [0], top_k=4)
    with pytest.raises(FastgenError, match="steps: 0"):
        generate_images(z_pipe, ["a"], [0], steps=0)
    with pytest.raises(FastgenError, match="no effect with guidance_scale 0"):
        generate_images(z_pipe, ["a"], [0], guidance_scale=0, negative_prompt="b")
    assert list(generate_images(janus_pipe, ["a"], [0], height=16, width=16))[0].image.size == (16, 16)
    with pytest.raises(FastgenError, match=r"has \d+ tokens .* the model takes 128"):
        generate_images(z_pipe, ["red " * 200], [0])
    list(generate_images(z_pipe, ["red " * 120], [0]))


def test_a_picture_that_is_not_a_number(z_pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = z_pipe.vae.decode
    monkeypatch.setattr(z_pipe.vae, "decode", lambda *a, **k: (decode(*a, **k)[0] * float("nan"),))
    with pytest.raises(FastgenError, match="NaN"):
        list(generate_images(z_pipe, ["a"], [0]))


def test_unknown_words(z_pipe: DiffusionPipeline, janus_pipe: DiffusionPipeline) -> None:
    for pipe in (z_pipe, janus_pipe):
        assert unknown_words(pipe, ["a red circle", "a photorealistic dog"]) == ["dog", "photorealistic"]


def change_weights(path: Path, change: str) -> None:
    tensors = load_file(path)
    # Not a tied or an optional one: a weight that every forward pass needs.
    name = next(name for name in sorted(tensors) if name.endswith(("to_q.weight", "q_proj.weight", "conv_in.weight")))
    if change == "missing":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][:1].clone()
    else:
        tensors["extra.weight"] = torch.zeros(1)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("change", ["missing", "shape", "extra"])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "janus"])
def test_keys_and_shapes(micro_z: Path, micro_janus: Path, tmp_path: Path, part: str, change: str) -> None:
    folder = Path(shutil.copytree(micro_janus if part == "janus" else micro_z, tmp_path / "model"))
    place = folder if part == "janus" else folder / part
    change_weights(next(place.glob("*.safetensors")), change)
    if change == "extra":  # harmless, as in many published checkpoints
        load_pipeline(str(folder))
        return
    with pytest.raises(FastgenError) as caught:
        load_pipeline(str(folder))
    message = str(caught.value)
    assert str(place) in message and "\n" not in message
    assert "lacks 1 weights" in message if change == "missing" else "shape" in message


def test_unknown_classes(micro_z: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(micro_z, tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    for changed in ({"transformer": ["diffusers", "NoSuchModel"]}, {"_class_name": "NoSuchPipeline"}):
        (folder / "model_index.json").write_text(json.dumps({**index, **changed}))
        with pytest.raises(FastgenError, match="NoSuch"):
            load_pipeline(str(folder))


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("gpu?", "auto"), ("cuda:x", "auto"), ("", "auto"), ("caf\udce9", "auto"), ("meta", "auto"), ("cpu", "float8")],
)
def test_names_that_cannot_exist(device: str, dtype: str) -> None:
    with pytest.raises(FastgenError, match="device|dtype"):
        resolve_device(device, dtype)


def test_devices_and_types() -> None:
    assert resolve_device("cpu", "auto") == (torch.device("cpu"), torch.float32)
    for name in ("float16", "bfloat16"):  # slow on a CPU, but every operation is there
        assert resolve_device("cpu", name)[1] == getattr(torch, name)
    if not torch.cuda.is_available():
        with pytest.raises(FastgenError, match="device: 'cuda' cannot be used"):
            load_pipeline("tiny", device="cuda")
    with pytest.raises(FastgenError, match="device"):
        load_pipeline("tiny", device="tpu9")
    with pytest.raises(FastgenError, match="dtype: 'float8'"):
        load_pipeline("tiny", dtype="float8")


def test_a_type_that_the_device_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'\nmore lines")

    monkeypatch.setattr(torch.nn.functional, "conv2d", refuse)
    with pytest.raises(FastgenError, match="device: 'cpu' cannot be used with dtype float16") as caught:
        resolve_device("cpu", "float16")
    assert "\n" not in str(caught.value)


def test_pictures_say_what_they_are_to_the_stock_ones(z_pipe: DiffusionPipeline, micro_janus: Path) -> None:
    """Sampled image tokens are another draw from the same law; greedy ones and diffusion are the stock result."""
    janus = load_pipeline(str(micro_janus))
    assert next(generate_images(z_pipe, ["a ring"], [0])).loss == "exact"
    assert next(generate_images(janus, ["a ring"], [0])).loss == "distribution"
    assert next(generate_images(janus, ["a ring"], [0], temperature=0.0)).loss == "exact"
