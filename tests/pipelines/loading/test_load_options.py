"""Schedulers, LoRA weights, offloading and tiles that are asked for while a model is loaded."""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generate_command import call
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_flows import tiny_flux
from tiny_unets import ddim, stock, tiny_sd, tiny_sdxl

from fastgen.errors import FastgenError
from fastgen.pipelines.generation import generate_images
from fastgen.pipelines.loading import load_pipeline
from fastgen.pipelines.loading.checkpoint import find_checkpoint
from fastgen.pipelines.loading.load_options import LoadOptions, LoRA

CPU = torch.device("cpu")


@cache
def sd() -> Any:
    return tiny_sd(ddim())


def copies() -> tuple[Any, Any]:
    """Two pipelines of the same weights."""
    return copy.deepcopy(sd()), copy.deepcopy(sd())


def options(pipe: Any, **asked: Any) -> LoadOptions:
    """Checked as before its weights load."""
    made = LoadOptions(**asked)
    made.check(type(pipe), dict(pipe.config), CPU)
    return made


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA weights for `tiny_sd` that change its pictures."""
    pipe = tiny_sd(ddim())
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    folder = tmp_path_factory.mktemp("lora")
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(folder, unet_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistep", "DDIMScheduler", "LCM"])
def test_a_scheduler_draws_what_it_draws_in_diffusers(name: str) -> None:
    import diffusers

    pipe, theirs = copies()
    options(pipe, scheduler=name).apply(pipe)
    theirs.scheduler = getattr(diffusers, f"{name.removesuffix('Scheduler')}Scheduler").from_config(
        theirs.scheduler.config
    )
    assert torch.equal(stock(pipe, "a red circle", 1), stock(theirs, "a red circle", 1))


@pytest.mark.parametrize("name", ["FlowMatchLCMScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_flow_models_take_the_schedulers_that_read_their_noise_levels(name: str, dynamic: bool) -> None:
    pipe = tiny_flux(dynamic)
    call = {"height": 32, "width": 32, "num_inference_steps": 24, "output_type": "pt"}
    draw = lambda: pipe("a red circle", generator=torch.Generator().manual_seed(1), **call)[0]  # noqa: E731
    before = draw()
    options(pipe, scheduler=name).apply(pipe)
    assert type(pipe.scheduler).__name__ == name and bool(torch.isfinite(draw()).all())
    if name.startswith("UniPC"):  # of higher order, for the same equation
        assert float((draw() - before).abs().mean()) < 0.2 * float(before.std())


def test_other_schedulers_are_refused_with_those_that_fit() -> None:
    with pytest.raises(FastgenError, match="scheduler: 'DDIM' is not allowed, .* needs one of FlowMatchEuler"):
        options(tiny_flux(True), scheduler="DDIM")
    with pytest.raises(FastgenError, match="'FlowMatchEulerDiscreteScheduler' is not allowed, .*DDIMScheduler"):
        options(tiny_sd(ddim()), scheduler="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(FastgenError, match="scheduler: needs the name"):
        LoadOptions(scheduler=5)  # type: ignore[arg-type]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_the_weight_of_a_lora_comes_after_a_colon(weight: float) -> None:
    assert LoRA.parse(f"owner/name:{weight!r}") == LoRA("owner/name", weight)
    assert LoRA.parse("owner/name") == LoRA("owner/name", 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no/such/file.safetensors", "is not allowed, needs a .safetensors file"),
        ("nothing.safetensors", "is not allowed, needs a .safetensors file"),
        ("owner/name:two", "'two' in .* is not a number"),
        ("owner/name:nan", "weight nan is not allowed"),
        ("owner/name:inf", "weight inf is not allowed"),
        ("", "is not allowed, needs a .safetensors file"),
        (5, "needs PATH or PATH:WEIGHT, got int"),
        (LoRA("owner/name", float("nan")), "weight nan"),
    ],
)
def test_what_is_no_lora_is_refused(text: Any, message: str) -> None:
    with pytest.raises(FastgenError, match=f"lora: .*{message}"):
        LoadOptions(loras=[text])


def test_only_whole_safetensors_files_are_loaded(tmp_path: Path, lora: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"cos\nsystem\n")
    (tmp_path / "cut.safetensors").write_bytes(lora.read_bytes()[:-8])
    (tmp_path / "empty").mkdir()
    needs = "needs a .safetensors file"
    for name, message in (("weights.bin", needs), ("cut.safetensors", "truncated"), ("empty", needs)):
        with pytest.raises(FastgenError, match=message):
            LoRA.parse(tmp_path / name)


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
def test_a_lora_draws_what_it_draws_in_diffusers(lora: Path, weight: float) -> None:
    pipe, theirs = copies()
    plain = stock(theirs, "a red circle", 1)
    asked = options(pipe, loras=f"{lora}:{weight}")
    asked.apply(pipe)
    theirs.load_lora_weights(lora.parent, adapter_name="x")
    theirs.set_adapters(["x"], [weight])
    drawn = stock(pipe, "a red circle", 1)
    assert torch.equal(drawn, stock(theirs, "a red circle", 1))
    assert torch.allclose(drawn, plain, atol=1e-5) == (weight == 0.0)
    assert asked.recorded["loras"][0]["weight"] == weight and len(asked.recorded["loras"][0]["sha256"][0]) == 64


def test_two_loras_add_up(lora: Path) -> None:
    pipe, theirs = copies()
    options(pipe, loras=[f"{lora}:0.25", f"{lora.parent}:0.75"]).apply(pipe)
    options(theirs, loras=[lora]).apply(theirs)
    np.testing.assert_allclose(stock(pipe, "a red circle", 1), stock(theirs, "a red circle", 1), atol=1e-5)


def test_a_lora_of_another_model_is_no_silence(lora: Path) -> None:
    for pipe in (tiny_sdxl(ddim()), tiny_flux(True)):
        with pytest.raises(FastgenError, match="lora: "):
            options(pipe, loras=lora).apply(pipe)


def test_pipelines_without_lora_schedulers_or_a_vae_say_so(lora: Path) -> None:
    from diffusers import DiTPipeline

    asked = LoadOptions(loras=lora)
    with pytest.raises(FastgenError, match="lora: DiTPipeline does not take LoRA weights"):
        asked.check(DiTPipeline, {}, CPU)
    with pytest.raises(FastgenError, match="scheduler: DiTPipeline has none"):
        LoadOptions(scheduler="DDIM").check(DiTPipeline, {}, CPU)
    with pytest.raises(FastgenError, match="vae_tiling: DiTPipeline has no VAE"):
        LoadOptions(vae_tiling=True).check(DiTPipeline, {}, CPU)


def test_tiles_are_decoded_on_request() -> None:
    pipe = tiny_sd(ddim())
    asked = options(pipe, vae_tiling=True)
    asked.apply(pipe)
    assert pipe.vae.use_tiling and asked.recorded == {"vae_tiling": True}
    assert LoadOptions(offload="auto").recorded == {}


def test_offloading_needs_a_gpu() -> None:
    pipe = tiny_sd(ddim())
    for way in ("model", "group", "sequential"):
        with pytest.raises(FastgenError, match=f"offload: '{way}' moves weights to a GPU"):
            options(pipe, offload=way)
    auto = options(pipe, offload="auto")
    assert auto.resolve_offload({"unet": 10**15}, None) == "none"
    assert auto.resolve_offload({"unet": 100, "vae": 1}, 131) == "model"
    with pytest.raises(FastgenError, match="offload: 'disk' is not allowed"):
        LoadOptions(offload="disk")


@pytest.mark.parametrize(("way", "device"), [("group", "cpu"), ("sequential", "meta")])
def test_offloaded_layers_have_hooks_that_fetch_them(way: str, device: str) -> None:
    pipe = tiny_sd(ddim())
    LoadOptions(offload=way).place(pipe, torch.device(device), way)  # type: ignore[arg-type]
    assert any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in pipe.unet.modules())


@given(st.lists(st.integers(0, 10**12), max_size=5), st.integers(0, 10**13))
def test_more_memory_never_means_more_moving(sizes: list[int], free: int) -> None:
    names = {str(i): size for i, size in enumerate(sizes)}
    choose_offload = LoadOptions(offload="auto").resolve_offload
    order = ["group", "model", "none"]
    assert order.index(choose_offload(names, free)) <= order.index(choose_offload(names, free * 2 + 1))
    if choose_offload(names, free) == "none":
        assert sum(sizes) <= free
    assert choose_offload(names, 2 * sum(sizes) + 1) == "none"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sd") / "model"
    sd().save_pretrained(place)
    return place


def test_python_and_command_line_add_the_same(
    folder: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    added = ["--lora", f"{lora}:0.5", "--scheduler", "DDPM", "--vae-tiling", "--offload", "auto"]
    command = ["a red circle", "--model", folder, "--steps", 3, "--seed", 4, "-o", tmp_path / "a.png", "--json"]
    code, out, err = call(capsys, *command, *added)
    assert code == 0, err
    settings = json.loads((tmp_path / "a.json").read_text())["settings"]
    assert (settings["scheduler"], settings["vae_tiling"], settings["loras"][0]["weight"]) == ("DDPM", True, 0.5)
    given = {"loras": f"{lora}:0.5", "scheduler": "DDPMScheduler", "vae_tiling": True, "offload": "auto"}
    pipe = load_pipeline(str(folder), **given)
    (picture,) = generate_images(pipe, ["a red circle"], [4], steps=3)
    # `generate` turns on the exact parts of `accelerate`, which are so up to rounding.
    drawn = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"), dtype=int)
    assert np.abs(drawn - np.asarray(picture.image, dtype=int)).max() <= 1
    # The picture is there, but not with another weight.
    assert json.loads(call(capsys, *command, *added)[1])["kept"] == 1
    assert json.loads(call(capsys, *command, *added[2:])[1])["kept"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheduler", "FlowMatch"], "scheduler: 'FlowMatch' is not allowed"),
        (["--lora", "nothing.safetensors"], "lora: 'nothing.safetensors' is not allowed"),
        (["--offload", "model"], "offload: 'model' moves weights to a GPU"),
        (["--offload", "everything"], "offload: 'everything' is not allowed"),
        (["--revision", "main"], "revision: 'main' is not allowed"),
    ],
)
def test_wrong_options_are_one_line_before_weights_load(
    options: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    weights = place / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: value * float("nan") for name, value in tensors.items()}, weights)
    code, out, err = call(capsys, "x", "--model", place, "-o", tmp_path / "a.png", *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


def test_a_revision_is_that_of_the_local_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two revisions of a Hub model; without a connection they come from the cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    for branch, commit in (("main", "a" * 40), ("old", "b" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
        index = repository / "snapshots" / commit / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"_commit": commit}))
    assert find_checkpoint("owner/name").folder.name == "a" * 40
    found = find_checkpoint("owner/name", revision="old")
    assert found.folder.name == "b" * 40 and found.revision == "old"
    with pytest.raises(FastgenError, match="model 'owner/name'"):
        find_checkpoint("owner/name", revision="none")
    pipe = load_pipeline("owner/name", revision="old")
    assert type(pipe).__name__ == "StableDiffusionPipeline"
