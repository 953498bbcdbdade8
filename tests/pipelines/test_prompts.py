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
from fastgen.cli.main import run
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
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("fastgen")]
    assert {text.split()[0] for text in messages} == encoders
    assert all(END in text for text in messages)


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
    with pytest.raises(FastgenError, match="does not fit its configuration"):
        fastgen.load_pipeline(str(folder))


LONG = "red " * 60 + END


def metadata(prompt: str) -> str:
    return json.dumps({"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": prompt}) + "\n"


@pytest.fixture
def run_json(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command; its result and the notes that it printed on stderr."""

    def call(*words: object) -> tuple[dict[str, Any], list[str]]:
        assert run([*map(str, words), "--json"]) == 0, capsys.readouterr().err
        out, err = capsys.readouterr()
        return json.loads(out), [line for line in err.splitlines() if line.startswith("note: ")]

    return call


@pytest.mark.parametrize("method", [[], ["--method", "search", "--policy", "random", "--max-nfe", "8"]])
def test_evaluations_say_once_what_is_cut_off_and_keep_it_in_the_record(
    method: list[str], sd: Path, tmp_path: Path, run_json: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text(metadata("a circle") + metadata(LONG) + metadata("x " + LONG))
    words = ["eval", "geneval", "--detector", "shapes", "--no-self-test", "--metadata", "prompts.jsonl"]
    words += ["--model", sd / "plain", "--steps", "2", "--images-per-prompt", "2", "--out", "new"]
    words += [*method, *(["--verifier", "shapes-verifier"] if method else [])]
    result, notes = run_json(*words)
    assert len(notes) == 2 and all(END in note and "text_encoder reads 24 tokens" in note for note in notes), notes
    assert result["stats"]["notes"] == [note.removeprefix("note: ") for note in notes]
    again, same = run_json(*words)  # a finished run loads no model, and says it all the same
    assert again["settings"]["images_made_now"] == 0
    assert again["stats"]["notes"] == result["stats"]["notes"] and same == notes
    assert json.loads(Path("new/scores.json").read_text())["stats"]["notes"] == result["stats"]["notes"]


def test_a_killed_run_keeps_what_was_cut_off(sd: Path, tmp_path: Path, run_json: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text(metadata(LONG) + metadata("a circle"))
    words = ["eval", "geneval", "--detector", "shapes", "--no-self-test", "--metadata", "prompts.jsonl"]
    words += ["--model", sd / "plain", "--steps", "2", "--images-per-prompt", "1", "--out", "new"]
    first, _ = run_json(*words)
    Path("new/00001/samples/0000.png").unlink()  # as if it had been killed after the first picture
    second, notes = run_json(*words)
    assert second["settings"]["images_made_now"] == 1
    assert second["stats"]["notes"] == first["stats"]["notes"] and len(notes) == 1


def test_benchmarks_say_what_is_cut_off_and_keep_it_in_the_record(
    sd: Path, tmp_path: Path, run_json: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastgen.evaluation.benchmarks.generate.PROMPT", LONG)
    words = ["bench", "generate", "--no-cold", "--runs", "2", "--steps", "1", "--batch", "1"]
    result, notes = run_json(*words, "--model", sd / "plain", "--out", "x.json")
    assert [note.removeprefix("note: ") for note in notes] == result["notes"]
    assert len(notes) == 1 and END in notes[0]
    assert json.loads(Path("x.json").read_text())["notes"] == result["notes"]


def test_the_sidecar_of_a_picture_holds_its_own_notes(sd: Path, tmp_path: Path, run_json: Any) -> None:
    (tmp_path / "prompts.txt").write_text(f"a circle\n{LONG}\n")
    words = ["generate", "--prompts-file", tmp_path / "prompts.txt", "--model", sd / "plain", "--steps", "1"]
    result, notes = run_json(*words, "-o", tmp_path / "new")
    first, second = (json.loads(Path(file).read_text())["stats"]["notes"] for file in result["sidecars"])
    assert first == [] and len(second) == 1 and f"note: {second[0]}" in notes and END in second[0]


def test_warnings_of_libraries_reach_the_user_of_an_evaluation(
    sd: Path, tmp_path: Path, run_json: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.check_inputs

    def warns(self: Any, *arguments: Any, **named: Any) -> None:
        logging.getLogger("diffusers.pipelines.stable_diffusion").warning("the picture\n will be strange")
        stock(self, *arguments, **named)

    monkeypatch.setattr(StableDiffusionPipeline, "check_inputs", warns)
    monkeypatch.chdir(tmp_path)
    words = ["eval", "shapes", "--model", sd / "plain", "--steps", "1", "--limit", "1", "--images-per-prompt", "1"]
    result, notes = run_json(*words, "--out", "new")
    assert notes == ["note: the picture will be strange"]
    assert result["stats"]["notes"] == ["the picture will be strange"]
