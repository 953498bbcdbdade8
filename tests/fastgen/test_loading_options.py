"""What a model is loaded with: one group of options for every command that draws with a model."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from fastgen.cli.main import COMMANDS, run
from fastgen.cli.options import LOADING

SHORT = ["--limit", "1", "--images-per-prompt", "1", "--steps", "2"]
WORDS: dict[str, list[str]] = {
    "generate": ["a ring"],
    "eval shapes": ["--allow-small", *SHORT],
    "eval geneval": ["--detector", "shapes", "--no-self-test", *SHORT],
    "eval fid": ["--allow-small", "--reference", "others", *SHORT],
    "tune": ["--prompts-file", "prompts.txt", "-o", "plan.json"],
}


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "others").mkdir()
    for number in range(4):
        Image.effect_noise((64, 64), 40 + number).convert("RGB").save(tmp_path / f"others/{number}.png")
    (tmp_path / "prompts.txt").write_text("a ring\n")


@pytest.mark.parametrize("name", WORDS)
def test_every_command_has_them_all(name: str) -> None:
    group, _, leaf = name.partition(" ")
    command: Any = typer.main.get_command(importlib.import_module(COMMANDS[group][0]).app)
    command = command.commands[leaf] if leaf else command
    options = {option.name: option for option in command.params}
    assert LOADING.keys() <= options.keys()
    assert {options[name].rich_help_panel for name in LOADING} == {"Loading"}


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--scheduler", "DDIM"], "scheduler: 'DDIM' is not allowed, a model with FlowMatchEuler"),
        (["--lora", "nowhere.safetensors"], "lora: 'nowhere.safetensors' is not allowed"),
        (["--offload", "disk"], "offload: 'disk' is not allowed, needs one of none, auto"),
        (["--offload", "model"], "offload: 'model' moves weights to a GPU, and the device is the CPU"),
        (["--quantize", "int3"], "quantize: 'int3' is not allowed"),
        (["--revision", "main"], "revision: 'main' is not allowed, needs a branch, tag or commit of a Hub id"),
        (["--variant", "fp 16"], "variant: 'fp 16' is not allowed"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_values_are_one_line_before_weights_load(
    name: str, option: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.Module.to", lambda *given: pytest.fail("a model was loaded"))
    where = ["--device", "cpu"]
    assert run([*name.split(), *WORDS[name], "--model", "tiny", *where, *option]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: ") and message in err[-1]


def test_a_run_draws_with_them_and_records_them(
    micro_z: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "geneval", *WORDS["eval geneval"], "--model", str(micro_z)]
    pictures = {}
    for scheduler in (None, "FlowMatchLCM"):
        out = tmp_path / f"{scheduler}"
        asked = [] if scheduler is None else ["--scheduler", scheduler]
        assert run([*words, "--out", str(out), *asked]) == 0, capsys.readouterr().err
        settings = json.loads((out / "run.json").read_text())["settings"]
        assert settings.get("loading") == (scheduler and {"scheduler": scheduler})
        pictures[scheduler] = Image.open(next(out.rglob("0000.png"))).tobytes()
    assert pictures[None] != pictures["FlowMatchLCM"]
    assert run([*words, "--out", str(tmp_path / "None"), "--scheduler", "FlowMatchLCM"]) == 2
    assert "loading" in capsys.readouterr().err


def test_they_are_refused_with_images_that_are_there_already(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "geneval", "--images", "others", "--detector", "shapes", "--vae-tiling"]) == 2
    assert "--vae-tiling: not allowed with --images" in capsys.readouterr().err


def test_a_plan_records_them(micro_z: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune", *WORDS["tune"], "--model", str(micro_z), "--minutes", "0.001", "--prompts", "3", "--steps", "2"]
    assert run([*words, "--loss", "exact", "--vae-tiling"]) == 0, capsys.readouterr().err
    assert json.loads(Path("plan.json").read_text())["measured"]["loading"] == {"vae_tiling": True}
