"""`fastgen models` and the support table: the package's file, the page and what tiny pipelines do agree."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import VQModel
from micro_models import save_micro_janus
from support_table import DOCUMENT, NAMES, TOKENS, pipeline, row
from tiny_families import tiny_pixart_sigma
from tiny_flows import tiny_sana
from tiny_newer import tiny_flux2, tiny_flux2_klein
from tiny_tokens import CODES

from fastgen.cli.main import run
from fastgen.cli.models import HUB, METHODS, markdown, read

FAST = ["pixart-sigma", "dit"]
SMALL = {"sana": 64, "z-image": 64}


def test_the_page_and_the_file_agree() -> None:
    rows = read()
    assert list(rows) == NAMES and all(list(each) == ["pipeline", *METHODS] for each in rows.values())
    assert DOCUMENT.read_text().split("<!-- table -->\n")[1] == markdown(rows)
    assert set(HUB) <= set(rows)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_family_does_what_the_table_says(name: str) -> None:
    assert row(name) == read()[name]


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : len(NAMES) + 1]] == NAMES


@pytest.mark.parametrize("asked", ["flux", "FluxPipeline", "black-forest-labs/FLUX.1-dev"])
def test_a_family_is_found_by_name_class_and_hub_id(asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"flux": {**read()["flux"], "hub": HUB["flux"]}}


@pytest.mark.parametrize("asked", ["nothing-of-this", "/"])
def test_another_name_is_refused_in_one_line(asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", asked]) == 2
    assert re.fullmatch(rf"error: NAME: '{asked}' is not in the table; .*\n", capsys.readouterr().err)


def commands() -> dict[str, tuple[str, list[str]]]:
    """The page's command of each family: the Hub id, and the words after `fastgen`."""
    families = {hub: family for family, hubs in HUB.items() for hub in hubs}
    found = re.findall(
        r'^fastgen generate "([^"]+)" --model (\S+)(.*) -o \S+$',
        DOCUMENT.read_text().replace("\\\n", " "),
        re.MULTILINE,
    )
    return {
        families[hub]: (hub, ["generate", prompt, *shlex.split(rest)])
        for prompt, hub, rest in found
        if hub in families
    }


def test_every_command_of_the_page_is_of_a_family() -> None:
    assert len(commands()) >= 8


#: With the layers and sizes that a call reads by default, which the tiny ones of other tests lack.
BY_DEFAULT: dict[str, Callable[[], Any]] = {
    "flux2": lambda: tiny_flux2(30),
    "flux2-klein": lambda: tiny_flux2_klein(27),
    "sana": lambda: tiny_sana(sample_size=16),
    "pixart-sigma": lambda: tiny_pixart_sigma(32),
}


def save(name: str, folder: Path, variant: str | None = None) -> None:
    """A tiny random model of the family, as the Hub has them."""
    if name == "janus":
        save_micro_janus(folder)
        return
    if name in TOKENS:
        pipe = pipeline(name)[0]
        pipe.model.save_pretrained(folder)
        pipe.tokenizer.save_pretrained(folder)
        return
    pipe: Any = BY_DEFAULT[name]() if name in BY_DEFAULT else pipeline(name)[0]
    pipe.save_pretrained(folder, variant=variant)


@pytest.mark.parametrize(
    "name",
    [name if name in ("flux", "qwen-image") else pytest.param(name, marks=pytest.mark.slow) for name in commands()],
)
def test_the_commands_of_the_page_draw(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny pipeline of the family in a folder in place of the Hub id, offline."""
    _, words = commands()[name]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "model"
    save(name, folder, "fp16" if "--variant" in words else None)
    side = str(SMALL.get(name, 32))
    size = ["--height", side, "--width", side, "--steps", "2"]
    if name in TOKENS:  # the last of several options of one name holds
        size = [] if name == "janus" else ["--model-option", "size=3x4"]
        monkeypatch.chdir(tmp_path)
        VQModel(num_vq_embeddings=CODES, latent_channels=4, vq_embed_dim=4).save_pretrained("VQ_FOLDER")
    out = tmp_path / "out.png"
    assert run([*words, "--model", str(folder), "-o", str(out), "--device", "cpu", *size]) == 0
    assert out.is_file() and out.with_suffix(".json").is_file()


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("multi_modality", "deepseek-community/Janus-Pro-1B"),
        ("glm_image", "GlmImagePipeline"),
        ("llama", "draws image tokens (janus"),
    ],
)
def test_a_transformers_folder_of_another_type_says_what_to_do(
    kind: str, advice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert run(["generate", "a red circle", "--model", str(tmp_path), "-o", str(tmp_path / "out.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and advice in error


def test_the_readme_promises_what_the_table_says() -> None:
    """Every method that works is named there, none that does not; weights are those of the page."""
    families = {hub: family for family, hubs in HUB.items() for hub in hubs}
    readme = (DOCUMENT.parents[1] / "README.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in readme.splitlines() if "](docs/models.md#" in line]
    assert len(lines) >= 10
    for name, ids, weights, untrained, trained in lines:
        for hub in re.findall(r"`([^`]+)`", ids):
            row = read()[families[hub]]
            if row["speculative"] == "yes":
                assert untrained == "speculative decoding without a drafter", name
            else:
                methods = ("kernels", "compile", "step cache", "search")
                assert untrained.split(", ") == [each for each in methods if row[each] == "yes"], name
                assert trained == ("dynamic chunking" if row["chunking"] == "trained" else "–"), name
        title = name.removeprefix("[").partition("]")[0]
        section = DOCUMENT.read_text().split(f"\n## {title}")[1].split("\n## ")[0]
        assert all(size in section for size in weights.split(", ")), name
