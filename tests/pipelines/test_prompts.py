"""What a text encoder does not read is refused or said; classes, variants and other kinds of checkpoints."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generate_command import call
from PIL import Image
from tiny_flows import tiny_flux, tiny_qwen_image, tiny_sd3
from tiny_unets import ddim, tiny_dit, tiny_sd, tiny_sdxl

import fastgen
from fastgen.errors import FastgenError
from fastgen.pipelines.prompts import check_prompt_lengths

END = "a blue circle at the end"


@pytest.mark.parametrize(
    ("make", "encoders"),
    [
        (lambda: tiny_sd(ddim()), {"text_encoder"}),
        (lambda: tiny_sdxl(ddim()), {"text_encoder", "text_encoder_2"}),
        (tiny_sd3, {"text_encoder", "text_encoder_2", "text_encoder_3"}),
        (lambda: tiny_flux(False), {"text_encoder", "text_encoder_2"}),
        (tiny_qwen_image, {"text_encoder"}),
    ],
)
def test_every_encoder_says_which_part_it_does_not_read(
    make: Any, encoders: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    pipe = make()
    with caplog.at_level(logging.WARNING, "fastgen"):
        check_prompt_lengths(pipe, ["a red circle"])
        assert "cut off" not in caplog.text
        check_prompt_lengths(pipe, ["red " * 2000 + END, "a ring"])
    told = [record.getMessage() for record in caplog.records if record.name.startswith("fastgen")]
    assert {text.split()[0] for text in told} == encoders
    assert all(END in text for text in told)


def test_a_limit_of_the_call_counts(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_qwen_image()
    check_prompt_lengths(pipe, ["red " * 30], 20)
    assert "reads 20 tokens" in caplog.text


def test_long_prompts_of_z_image_with_dynamic_chunking_are_refused(micro_dc: Path) -> None:
    pipe: Any = fastgen.load_pipeline(str(micro_dc))
    long = "green star and " * 300
    with pytest.raises(FastgenError, match="tokens with its frame, the model takes"):
        pipe(long, num_inference_steps=1)
    with pytest.raises(FastgenError, match="tokens with its frame"):
        fastgen.generate_images(pipe, [long], [1])
    with pytest.raises(FastgenError, match="the model takes 32"):
        pipe("a green star and a ring " * 8, num_inference_steps=1, max_sequence_length=32)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    pipe = tiny_sd(ddim())
    pipe.save_pretrained(folder / "plain")
    pipe.save_pretrained(folder / "fp16", variant="fp16")
    return folder


def test_the_command_line_says_what_is_cut_off(sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("red " * 60 + END, "--model", sd / "plain", "--steps", 1, "-o", tmp_path / "out.png")
    code, _, stderr = call(capsys, *arguments)
    assert code == 0 and END in stderr, stderr
    assert sum(line.startswith("note: text_encoder reads 24 tokens") for line in stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["StableDiffusionInpaintPipeline", "StableDiffusionImg2ImgPipeline"])
def test_pipelines_that_begin_with_a_picture_are_named(
    name: str, sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for part in (sd / "plain").iterdir():
        if part.is_dir():
            (folder / part.name).symlink_to(part)
    index = json.loads((sd / "plain/model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    code, _, stderr = call(capsys, "a ring", "--model", folder, "-o", tmp_path / "out.png")
    assert code == 2 and name in stderr and len(stderr.splitlines()) == 1


def test_variants_are_read_when_asked_for(sd: Path) -> None:
    with pytest.raises(FastgenError, match="only weights of the variant fp16"):
        fastgen.load_pipeline(str(sd / "fp16"))
    with pytest.raises(FastgenError, match="variant: 5 is not allowed"):
        fastgen.load_pipeline(str(sd / "fp16"), variant=5)  # type: ignore[arg-type]
    images = [
        np.asarray(next(fastgen.generate_images(pipe, ["a ring"], [1], steps=1)).image)
        for pipe in (fastgen.load_pipeline(str(sd / "fp16"), variant="fp16"), fastgen.load_pipeline(str(sd / "plain")))
    ]
    assert np.array_equal(*images)


def test_a_damaged_variant_that_is_not_needed_is_left_alone(sd: Path) -> None:
    damaged = sd / "plain/unet/diffusion_pytorch_model.fp16.safetensors"
    damaged.write_bytes(b"broken")
    try:
        fastgen.load_pipeline(str(sd / "plain"))
        with pytest.raises(FastgenError, match="fp16.safetensors is truncated"):
            fastgen.load_pipeline(str(sd / "plain"), variant="fp16")
    finally:
        damaged.unlink()


def test_an_optional_part_may_be_left_out(tmp_path: Path) -> None:
    pipe = tiny_sd3()
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "sd3")
    loaded: Any = fastgen.load_pipeline(str(tmp_path / "sd3"))
    assert loaded.text_encoder_3 is None
    assert next(fastgen.generate_images(loaded, ["a ring"], [1], steps=1, height=32, width=32)).image.size == (32, 32)


def test_classes_are_prompts_of_dit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_dit(ddim()).save_pretrained(tmp_path / "dit")
    index = tmp_path / "dit/model_index.json"  # diffusers reads the names there and does not write them
    names = {"207": "golden retriever", "1": "fish, goldfish"}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": names}))
    pictures = []
    for prompt in ("207", "golden retriever", "fish"):
        out = tmp_path / f"{prompt}.png"
        code, _, stderr = call(capsys, prompt, "--model", tmp_path / "dit", "--steps", 1, "-o", out)
        assert code == 0, stderr
        pictures.append(Image.open(out).tobytes())
    for prompt in ("cat", "1000", "9" * 30, "-1"):
        code, _, stderr = call(capsys, "--model", tmp_path / "dit", "-o", tmp_path / "no.png", "--", prompt)
        assert code == 2 and "the model has no class" in stderr and len(stderr.splitlines()) == 1, stderr
    assert pictures[0] == pictures[1] != pictures[2]


def test_weights_that_the_configuration_leaves_unused_are_an_error(micro_z: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(micro_z, folder)
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps({**config, "n_layers": 0}))
    with pytest.raises(FastgenError, match="weights without use.*do not fit"):
        fastgen.load_pipeline(str(folder))
