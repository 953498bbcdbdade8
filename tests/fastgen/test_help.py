"""The help of commands: panels by method, examples, the options of a recipe, completion, and --verbose."""

from __future__ import annotations

import importlib
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from fastgen.cli import eval as eval_group
from fastgen.cli import generate
from fastgen.cli.main import COMMANDS, run
from fastgen.cli.panels import PANELS, arrange, verbose_option
from fastgen.errors import FastgenError
from fastgen.pipelines.schema import Rule
from fastgen.training.recipes import RECIPES, CascadeCalibrate, SearchCalibrate

EVERY_RECIPE = {**RECIPES, **{each.name: each for each in (CascadeCalibrate, SearchCalibrate)}}


def shown(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    assert run([*words, "--help"]) == 0
    return capsys.readouterr().out


def test_options_stand_in_the_panel_of_their_method(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(["generate"], capsys, monkeypatch)
    places = [text.index(f"─ {panel} ─") for panel in ("Options", *PANELS.values())]
    assert places == sorted(places)
    panels = dict(zip(("Options", *PANELS.values()), re.split("\n╭─", text)[2:], strict=False))
    for panel, option in (
        ("Options", "--seed"),
        ("Options", "--verbose"),
        (PANELS["diffusion"], "--negative-prompt"),
        (PANELS["autoregressive"], "--top-k"),
        (PANELS["dynamic chunking"], "--tail-drop"),
        (PANELS["speculative"], "--tree"),
        (PANELS["search"], "--max-nfe"),
    ):
        assert option in panels[panel], (panel, option)
    assert "Examples:" in text and 'fastgen generate "three red circles" -o out.png' in text


def _commands() -> dict[str, Any]:
    """Every command by its words, e.g. "eval fid"."""
    found = {}
    for name, (module, _) in COMMANDS.items():
        command = typer.main.get_command(importlib.import_module(module).app)
        leaves = getattr(command, "commands", None)
        found |= {name: command} if leaves is None else {f"{name} {word}": leaf for word, leaf in leaves.items()}
    return found


LEAVES = _commands()


@pytest.mark.parametrize("command", LEAVES)
def test_every_help_ends_with_an_example_that_fits_and_is_short(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(command.split(), capsys, monkeypatch)
    panels, _, end = text.partition("Examples:")
    examples = [line.strip() for line in end.splitlines() if line.strip()]
    options = {word for option in LEAVES[command].params for word in option.opts} | {"--help"}
    assert examples
    for example in examples:
        words = shlex.split(example)
        assert words[: 1 + len(command.split())] == ["fastgen", *command.split()]
        assert {word for word in words if word.startswith("-")} <= options, example
    assert "--verbose" in panels
    assert all(panel.count("\n") <= 60 for panel in panels.split("╭─"))


@pytest.mark.parametrize("module", [generate, eval_group], ids=["generate", "eval"])
def test_no_help_names_its_panel_again(module: object) -> None:
    command = typer.main.get_command(module.app)  # type: ignore[attr-defined]
    for name, leaf in getattr(command, "commands", {"generate": command}).items():
        arrange(name, leaf)
        for option in leaf.params:
            text = getattr(option, "help", None) or ""
            assert not any(f"({method})." in f"{text}." for method in PANELS), (name, text)


def test_train_lists_the_recipes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(["train"], capsys, monkeypatch)
    for settings in EVERY_RECIPE.values():
        assert re.search(rf" {settings.name} +{re.escape(settings.summary)} ", text), settings.name
    assert {f"train {name}" for name in EVERY_RECIPE} == {name for name in LEAVES if name.startswith("train ")}


@pytest.mark.parametrize("recipe", [*RECIPES])
def test_a_recipe_shows_its_own_defaults(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(["train", recipe], capsys, monkeypatch)
    for option, name in (("--steps", "steps"), ("--batch-size", "batch_size"), ("--lr", "lr")):
        (line,) = [line for line in text.splitlines() if f" {option} " in line]
        assert f"Default: {RECIPES[recipe].defaults[name]}." in line


@pytest.mark.parametrize("recipe", [*EVERY_RECIPE])
def test_a_recipe_has_the_options_of_its_settings_and_refuses_others(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {f"--{name.replace('_', '-')}" for name in EVERY_RECIPE[recipe].rules()}
    every = {option for name in EVERY_RECIPE for p in LEAVES[f"train {name}"].params for option in p.opts}
    has = {option for parameter in LEAVES[f"train {recipe}"].params for option in parameter.opts}
    assert has == own | {"--output", "-o", "--json"}
    for option in sorted(every - has):
        assert run(["train", recipe, "-o", f"{tmp_path}/o", option, "1"]) == 2
        assert capsys.readouterr().err.startswith(f"error: No such option: {option}")


def _wrong(rule: Rule) -> str:
    """A value that a rule does not allow."""
    if rule.choices:
        return "mystery"
    if rule.kind in (int, float):
        return "-3"
    return "width" if rule.kind == list[str] else ""


@pytest.mark.parametrize(
    ("recipe", "name"),
    [(recipe, name) for recipe, settings in EVERY_RECIPE.items() for name in settings.rules() if name != "compile"],
)
def test_one_error_names_the_option_of_a_bad_value(
    recipe: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option, value = f"--{name.replace('_', '-')}", _wrong(EVERY_RECIPE[recipe].rules()[name])
    assert run(["train", recipe, "-o", f"{tmp_path}/o", option, value]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option}: ") and error.count("\n") == 1
    assert "is not allowed" in error
    with pytest.raises(FastgenError, match=f"^{name}: "):
        EVERY_RECIPE[recipe](**{name: object()})


@pytest.mark.parametrize(("words", "wanted"), [("fastgen gen", "generate"), ("fastgen generate --max-n", "--max-nfe")])
def test_shells_complete_commands_and_options(
    words: str, wanted: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_FASTGEN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    run([])
    assert capsys.readouterr().out.split() == [wanted]


def test_verbose_logs_on_stderr_inside_the_command_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastgen.cli import info

    def collect() -> dict[str, object]:
        logging.getLogger("fastgen.kernels").info("the reference runs")
        raise ValueError("enough")

    monkeypatch.setattr(info, "collect", collect)
    before = logging.getLogger("fastgen").level, list(logging.getLogger("fastgen").handlers)
    for words, logged in (([], False), (["-v"], True), (["--verbose"], True)):
        assert run(["info", *words]) == 2
        assert ("fastgen.kernels: the reference runs" in capsys.readouterr().err) is logged
        assert before == (logging.getLogger("fastgen").level, list(logging.getLogger("fastgen").handlers))
    assert verbose_option().opts == ["-v", "--verbose"]
