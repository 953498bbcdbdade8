"""`--variant` of every command that loads a `--model`: a folder, or a Hub id in the local cache, of variants alone."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from fastgen.cli import main as cli
from fastgen.cli.main import run
from fastgen.cli.methods import variant_option

HUB_ID, COMMIT = "owner/halves", "0123456789abcdef0123456789abcdef01234567"
SHORT = ["--limit", "1", "--images-per-prompt", "1", "--steps", "1"]
#: Words of a short run of each command.
DRAWING = {
    "generate": ["generate", "a ring", "--steps", "1"],
    "eval shapes": ["eval", "shapes", *SHORT],
}
MORE = {
    "eval geneval": ["eval", "geneval", "--detector", "shapes", "--no-self-test", *SHORT],
    "eval fid": ["eval", "fid", "--allow-small", "--bootstrap", "0", "--reference", "others", *SHORT],
    "bench generate": ["bench", "generate", "--no-cold", "--runs", "1", "--batch", "1", "--steps", "1"],
    "bench search": ["bench", "search", "--policy", "random", "--budget", "12", "--seeds", "1", "--limit", "1"],
}


def variant_only(source: Path, target: Path) -> Path:
    """A copy of a model whose weight files are all of the variant fp16."""
    shutil.copytree(source, target)
    for file in target.rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    return target


@pytest.fixture(params=["folder", "hub"])
def halves(request: pytest.FixtureRequest, micro_z: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `--model` gets; the tests run with HF_HUB_OFFLINE=1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "others").mkdir()
    side = json.loads((micro_z / "fastgen.json").read_text())["height"]
    for number in range(4):
        Image.effect_noise((side, side), 40 + number).convert("RGB").save(tmp_path / f"others/{number}.png")
    if request.param == "folder":
        return str(variant_only(micro_z, tmp_path / "halves"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    variant_only(micro_z, home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs/main").write_text(COMMIT)
    return HUB_ID


@pytest.mark.parametrize("name", [*DRAWING, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_every_drawing_command_reads_the_variant(name: str, halves: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*(DRAWING | MORE)[name], "--model", halves]
    assert run([*words, "--variant", "fp 16"]) == 2
    assert "variant: 'fp 16' is not allowed" in capsys.readouterr().err
    assert run(words) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert captured.out == "" and last.startswith("error: ") and "fp16" in last and "--variant" in last, captured.err
    assert run([*words, "--variant", "fp16", "--json"]) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)
    settings = result.get("generation") or result["settings"]
    if not name.startswith("bench"):
        assert settings["variant"] == "fp16"
        assert run([*words, "--variant", "fp16", "--json"]) == 0  # the pictures are there
        again = json.loads(capsys.readouterr().out)
        assert again.get("kept") == 1 or (again.get("generation") or again["settings"])["images_made_now"] == 0


@pytest.mark.slow
def test_benchmarks_of_two_models_or_of_tokens_read_the_variant(
    micro_z: Path, micro_dc: Path, micro_janus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dc, dense, janus = (
        str(variant_only(source, tmp_path / source.name)) for source in (micro_dc, micro_z, micro_janus)
    )
    for words, option in (
        (
            ["dc", "--model", dc, "--dense", dense, "--no-peers", "--tail-drop", "0", "--guidance-scale", "2"],
            "--variant",
        ),
        (["speculative", "--model", janus, "--no-compile", "--variant", "exact jacobi-4"], "--model-variant"),
    ):
        words = ["bench", *words, "--runs", "1", "--limit", "1", "--images-per-prompt", "1"]
        words += ["--folder", str(tmp_path / f"new-{words[1]}"), "--json"]
        assert run(words) == 2
        assert "fp16" in capsys.readouterr().err
        assert run([*words, option, "fp16"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["settings"]["model_variant"] == "fp16" and len(result["rows"]) >= 2


def leaves() -> dict[str, Any]:
    apps = {
        name: typer.main.get_command(importlib.import_module(module).app) for name, (module, _) in cli.COMMANDS.items()
    }
    return {
        f"{name} {word}".strip(): leaf
        for name, app in apps.items()
        for word, leaf in getattr(app, "commands", {"": app}).items()
    }


def test_every_command_with_a_model_offers_its_variant() -> None:
    found = {}
    for name, leaf in leaves().items():
        if any(parameter.name == "model" for parameter in leaf.params) and name.split()[0] != "train":
            helps = [getattr(parameter, "help", None) for parameter in leaf.params]
            found[name] = helps.count(variant_option().help)
    others = {"bench accelerate", "bench dc", "bench serve", "bench speculative", "serve", "tune"}
    assert set(DRAWING | MORE) | others == set(found) and set(found.values()) == {1}
