"""`fastgen generate --method search --image`: img2img and inpainting."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generate_command import call
from PIL import Image
from stock_families import family

import fastgen.pipelines.loading as loading

SEARCH = ["--method", "search", "--verifier", "shapes-verifier", "--policy", "best-of-n", "--steps", 4, "--seed", 3]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "in.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    path = tmp_path / "mask.png"
    Image.fromarray(np.repeat([[255], [0]], 32, axis=0).astype(np.uint8).repeat(64, axis=1)).save(path)
    return path


@pytest.mark.parametrize("masked", [False, True])
def test_one_candidate_is_the_stock_picture(
    masked: bool, micro_z: Path, image: Path, mask: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import diffusers

    options = ["--model", micro_z, "--image", image, "--strength", 0.5, "--max-nfe", 4, "--guidance-scale", 2.0]
    options += ["--height", 64, "--width", 64]
    code, _, stderr = call(
        capsys, "a ring", *SEARCH, *options, *(["--mask", mask] if masked else []), "-o", tmp_path / "a.png"
    )
    assert code == 0, stderr
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["settings"]["image"] == hashlib.sha256(image.read_bytes()).hexdigest()[:16]
    assert found["settings"]["strength"] == 0.5 and (found["settings"]["mask"] is not None) == masked
    assert found["search"]["nfe"] == 4  # half of the steps, two passes each
    kind = getattr(diffusers, "ZImageInpaintPipeline" if masked else "ZImageImg2ImgPipeline")
    pipe: Any = kind.from_pipe(loading.load_pipeline(micro_z, dtype="float32"))
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"image": Image.open(image), "strength": 0.5, "height": 64, "width": 64}
    arguments |= {"mask_image": Image.open(mask)} if masked else {}
    generator = torch.Generator().manual_seed(3)
    stock = pipe("a ring", num_inference_steps=4, guidance_scale=2.0, generator=generator, **arguments).images[0]
    ours = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    assert np.abs(ours - np.asarray(stock).astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mask", "{mask}"], "--mask: needs --image"),
        (["--strength", "0.5"], "--strength: needs --image"),
        (["--image", "{image}", "--strength", "0"], "--strength: 0.0 is not allowed"),
        (["--image", "{image}", "--strength", "nan"], "--strength: nan is not allowed"),
        (["--image", "nowhere.png"], "--image: nowhere.png is no picture that can be read"),
        (["--image", "{text}"], "is no picture that can be read"),
        (["--image", "{image}", "--mask", "{small}"], "needs those of --image, 64 x 64"),
        (["--image", "{image}", "--model", "small-dc"], "begins with no picture"),
    ],
)
def test_bad_pictures_are_one_line_before_weights_load(
    options: list[str],
    said: str,
    image: Path,
    mask: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_checkpoint", load)
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    names = {"image": image, "mask": mask, "text": tmp_path / "text.png", "small": tmp_path / "small.png"}
    given = [option.format(**names) for option in options]
    code, _, stderr = call(capsys, "a ring", *SEARCH, *given, "-o", tmp_path / "a.png")
    (line,) = stderr.splitlines()
    assert code == 2 and line.startswith("error: ") and said in line


def test_only_a_search_begins_with_a_picture(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, stderr = call(capsys, "a ring", "--image", image)
    assert code == 2 and stderr == "error: --image: needs --method search\n"


@pytest.mark.parametrize("name", ["stable-diffusion-edit", "stable-diffusion-inpaint", "z-image-img2img"])
def test_a_folder_of_a_pipeline_that_itself_begins_with_a_picture_draws(
    name: str, image: Path, mask: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family(name).save_pretrained(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--image", image, "--max-nfe", 12]
    options += ["--height", 64, "--width", 64] if "edit" not in name else []
    options += ["--mask", mask] if "inpaint" in name else []
    code, _, stderr = call(capsys, "a ring", *SEARCH, *options, "-o", tmp_path / "a.png")
    assert code == 0, stderr
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["settings"]["image"] and found["search"]["finished"]
