"""Emu3, Chameleon, Lumina-mGPT and LlamaGen from a folder: by `load_pipeline`, and by `fastgen generate`."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel
from tiny_tokens import CODES, WORDS, chameleon, emu3, llamagen

import fastgen
from fastgen.cli.main import run
from fastgen.cli.options import model_options
from fastgen.drafters.targets import registry
from fastgen.errors import FastgenError
from fastgen.pipelines.loading.checkpoint import TOKEN_MODELS, find_checkpoint
from fastgen.pipelines.speculative import SpeculativeImagePipeline

LINE_END = WORDS.index("<eol>")
#: What is typed for each, and what it means in Python.
TYPED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "emu3": (["size=3x4", "negative=a"], {"size": [3, 4], "negative": "a"}),
    "anole": (["size=2x3", "decode=DECODER"], {"size": [2, 3]}),
    "lumina": (
        ["size=3x4", f"line_end={LINE_END}", "begin=4,8,9", "decode=DECODER"],
        {"size": [3, 4], "line_end": LINE_END, "begin": [4, 8, 9]},
    ),
    "llamagen": ([], {}),
}
MODELS = {"emu3": emu3, "anole": chameleon, "lumina": chameleon, "llamagen": llamagen}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {name: root / name for name in (*MODELS, "decoder")}
    for name in ("emu3", "anole"):
        target: Any = MODELS[name]()
        target.model.save_pretrained(found[name])
        target.tokenizer.save_pretrained(found[name])
    found["lumina"] = found["anole"]
    target = llamagen()
    target.model.save_pretrained(found["llamagen"], target.tokenizer)
    torch.manual_seed(0)
    decoder = VQModel(
        num_vq_embeddings=CODES, latent_channels=4, block_out_channels=(8,), norm_num_groups=4, vq_embed_dim=4
    )
    decoder.save_pretrained(found["decoder"])
    return found


def typed(name: str, folders: dict[str, Path]) -> list[str]:
    return [text.replace("DECODER", str(folders["decoder"])) for text in TYPED[name][0]]


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_draws_the_tokens_of_the_model_in_memory(name: str, folders: dict[str, Path]) -> None:
    target: Any = MODELS[name]()
    options = TYPED[name][1]
    expected = SpeculativeImagePipeline(target.model, target.tokenizer, options=options)
    loaded = fastgen.load_pipeline(str(folders[name]), options=model_options(typed(name, folders)))
    assert isinstance(loaded, SpeculativeImagePipeline)
    settings = {"output_type": "tokens", "guidance_scale": 2.0}
    ours, theirs = (
        pipe("a red ring", generator=torch.Generator().manual_seed(0), **settings).tokens
        for pipe in (loaded, expected)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_generate_draws_with_each_and_writes_its_options(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    arguments = [part for text in typed(name, folders) for part in ("--model-option", text)]
    file = tmp_path / "ring.png"
    command = ["generate", "a red ring", "--model", str(folders[name]), "--device", "cpu", "-o", str(file), *arguments]
    assert run(command) == 0
    record = json.loads(file.with_suffix(".json").read_text())
    assert record["settings"]["method"] == "speculative"
    written = record["settings"].get("options", {})
    assert {key: value for key, value in written.items() if key != "decode"} == TYPED[name][1]
    from PIL import Image

    picture = Image.open(file)
    if "size" in TYPED[name][1]:
        height, width = TYPED[name][1]["size"]
        assert picture.height * width == picture.width * height, "as many pixels for a token in both directions"


def test_a_saved_pipeline_loads_by_its_folder_with_its_options(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe: Any = fastgen.load_pipeline(str(folders["emu3"]), options={"size": [3, 4], "negative": "a"})
    pipe.save_pretrained(tmp_path)
    loaded: Any = fastgen.load_pipeline(str(tmp_path))
    assert loaded.options == {"size": [3, 4], "negative": "a"}
    assert fastgen.load_pipeline(str(tmp_path), options={"size": [2, 2]}).options["size"] == [2, 2]


def test_pictures_of_chameleon_are_those_of_the_decoder(folders: dict[str, Path]) -> None:
    network = VQModel.from_pretrained(folders["decoder"])
    pipe = SpeculativeImagePipeline(
        chameleon().model, chameleon().tokenizer, options={"size": (2, 3), "decode": network}
    )
    output = pipe("ring", output_type="pt", generator=torch.Generator().manual_seed(0))
    vectors = network.quantize.embedding(output.tokens.view(1, 2, 3)).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = network.decode(vectors, force_not_quantize=True).sample.add(1).div(2).clamp(0, 1)
    assert torch.allclose(output.images, expected, atol=1e-6)


WRONG: dict[str, tuple[str, list[str], str]] = {
    "no decoder": ("anole", ["--model-option", "size=2x3"], "no decoder of its codes; give a VQModel"),
    "no folder": ("anole", ["--model-option", "decode=nowhere"], "decode='nowhere' is no folder"),
    "no number": ("emu3", ["--model-option", "size=3"], "size='3' is not allowed, needs HEIGHTxWIDTH"),
    "no name": ("emu3", ["--model-option", "depth=3"], "depth is not allowed, the model has size, negative"),
    "other model": ("emu3", ["--model-option", "line_end=3"], "line_end is not allowed, the model has size, negative"),
    "no options": ("llamagen", ["--model-option", "size=3x3"], "size is not allowed, the model has no such options"),
    "too small": ("emu3", ["--model-option", "size=0x3"], "size: 0 is not allowed"),
    "pixels": ("emu3", ["--height", "64"], "height: not in pixels"),
    "method": ("llamagen", ["--method", "base"], "draws by method speculative"),
    "search": ("llamagen", ["--method", "search"], "draws tokens"),
    "negative": ("emu3", ["--negative-prompt", "a"], "the model's option negative does that"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_one_line_before_weights_load(
    wrong: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fastgen.pipelines.loading import loader

    def never(*_: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(loader, "load_network", never)
    name, arguments, message = WRONG[wrong]
    command = ["generate", "a", "--model", str(folders[name]), "--device", "cpu", "-o", str(tmp_path / "a.png")]
    assert run([*command, *arguments]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\n", error) and message in error


def test_values_are_checked_with_the_model(folders: dict[str, Path]) -> None:
    for options in ({"line_end": len(WORDS) + CODES}, {"begin": []}, {"begin": "3"}, {"begin": [-1]}, {"size": 3}):
        with pytest.raises(FastgenError, match=f"{next(iter(options))}: .* is not allowed"):
            fastgen.load_pipeline(
                str(folders["anole"]), options=options if options != {"begin": "3"} else {"begin": {}}
            )
    small = VQModel(num_vq_embeddings=CODES - 1, latent_channels=4, block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(FastgenError, match="decode: this VQModel has 23 codes, the model 24"):
        SpeculativeImagePipeline(chameleon().model, chameleon().tokenizer, options={"decode": small})


@pytest.mark.parametrize("kind", TOKEN_MODELS)
def test_the_options_of_a_checkpoint_are_those_of_its_adapter(kind: str) -> None:
    name, options = TOKEN_MODELS[kind]
    taken = list(inspect.signature(registry._FACTORIES[name]).parameters)
    assert taken == ["model", "tokenizer", *options]


def test_glm_images_language_model_alone_names_its_pipeline(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "glm_image"}')
    with pytest.raises(FastgenError, match="GlmImagePipeline"):
        find_checkpoint(str(tmp_path))
