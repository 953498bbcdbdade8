"""Verifiers by name: the known names, when each is loaded, and errors when weights cannot be loaded."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_verifiers import PROMPTS, save_qwen
from torch import Tensor

from fastgen.errors import FastgenError
from fastgen.evaluation.verifiers.names import VERIFIERS, load_verifier


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty Hub cache and no network."""
    import huggingface_hub.constants
    import transformers.utils.hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for module in (huggingface_hub.constants, transformers.utils.hub):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)


def test_importing_the_names_imports_no_network_library() -> None:
    code = (
        "import sys, fastgen.evaluation\n"  # looks at torchvision, and so at torch, itself
        "before = set(sys.modules)\n"
        "import fastgen.evaluation.verifiers.names\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'open_clip', 'numpy', 'PIL'}\n"
        "print(sorted(heavy & ({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(VERIFIERS))
def test_every_name_leads_to_a_class_of_that_name(name: str) -> None:
    module, _, attribute = VERIFIERS[name].partition(":")
    module = f"fastgen.evaluation.verifiers.{module}"
    if importlib.util.find_spec(module) is None:
        with pytest.raises(FastgenError, match=f"'{name}' does not come with this version"):
            load_verifier(name)
        return
    assert getattr(importlib.import_module(module), attribute).name == name


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("clip-score", "openai/clip-vit-large-patch14"),
        ("clip-score:someone/clip", "someone/clip"),
        ("pick-score", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ("aesthetic", "trl-lib/ddpo-aesthetic-predictor"),
        ("hps-v2.1", "xswu/HPSv2"),
        ("vqa-score", "zhiqiulin/clip-flant5-xxl"),
        ("qwen-vl", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("qwen-vl:Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"),
    ],
)
def test_missing_weights_are_named_with_the_way_to_get_them(name: str, missing: str) -> None:
    use = f"then load {name.partition(':')[0]}:FOLDER"
    if name == "pick-score":
        use = "then copy its tokenizer and preprocessor files next to the weights of yuvalkirstain/PickScore_v1"
    if name.startswith("hps"):
        pytest.importorskip("open_clip")
    with pytest.raises(FastgenError) as caught:
        load_verifier(name)
    message = str(caught.value)
    assert message.startswith(f"verifier {name.partition(':')[0]}: model {missing!r}") and "\n" not in message
    assert f"hf download {missing}" in message
    assert message.endswith(use)


def test_weights_after_the_colon(clip_folder: Path, images: Tensor) -> None:
    found: Any = load_verifier(f"pick-score:{clip_folder}", batch_size=3, cache_size=5)
    assert (found.name, found.weights, found.batch_size, found.cache_size) == ("pick-score", str(clip_folder), 3, 5)
    assert found.score(images, PROMPTS).shape == (6,)


def test_a_folder_names_its_verifier(clip_folder: Path, vqa_folder: Path, tmp_path: Path) -> None:
    assert load_verifier(clip_folder).name == "clip-score"
    assert load_verifier(str(vqa_folder)).name == "vqa-score"
    assert load_verifier(save_qwen(tmp_path / "qwen", "3")).name == "qwen-vl"
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FastgenError, match=f"does not say which verifier .* write NAME:{tmp_path}"):
        load_verifier(tmp_path)


def test_a_folder_with_a_part_only_says_where_the_other_belongs(vqa_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "aesthetic").mkdir()
    tensors = {"layers.0.weight": torch.zeros(1, 12), "layers.0.bias": torch.zeros(1)}
    torch.save(tensors, tmp_path / "aesthetic" / "aesthetic-model.pth")
    with pytest.raises(
        FastgenError, match="'openai/clip-vit-large-patch14' .* copy it to clip/ next to aesthetic-model"
    ):
        load_verifier(f"aesthetic:{tmp_path / 'aesthetic'}")
    shutil.copytree(vqa_folder, tmp_path / "vqa")
    shutil.rmtree(tmp_path / "vqa" / "tokenizer")
    with pytest.raises(FastgenError, match="model 'google/flan-t5-xl' .* copy its tokenizer files to tokenizer/"):
        load_verifier(tmp_path / "vqa")
    shutil.rmtree(tmp_path / "vqa" / "vision_tower")
    shutil.copytree(vqa_folder / "tokenizer", tmp_path / "vqa" / "tokenizer")
    with pytest.raises(FastgenError, match="'openai/clip-vit-large-patch14-336' .* copy it to vision_tower/"):
        load_verifier(tmp_path / "vqa")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name_or_path": "clip"}, "verifier: 'clip' is unknown, needs one of aesthetic, clip-score"),
        ({"name_or_path": "clip-score:"}, "names no weights after the colon"),
        (
            {"name_or_path": "clip-score:/no/such/folder"},
            "'/no/such/folder' is neither a folder or file that exists nor",
        ),
        ({"name_or_path": "vqa-score:./no"}, "'./no' is neither a folder or file that exists nor a Hub id"),
        ({"name_or_path": "clip-score", "device": "gpu 1"}, "device: 'gpu 1' cannot be used"),
        ({"name_or_path": "vqa-score", "dtype": "int8"}, "dtype: 'int8' is not allowed"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(FastgenError, match=message):
        load_verifier(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_an_error_before_any_weight_is_read(clip_folder: Path) -> None:
    with pytest.raises(FastgenError, match="device: 'cuda' cannot be used"):
        load_verifier(f"clip-score:{clip_folder}", device="cuda")
