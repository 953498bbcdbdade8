"""One schema of settings: the same ranges in Python, on the command line and in JSON Schema."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import typer

from fastgen.cli import eval as eval_group
from fastgen.cli import generate
from fastgen.cli.options import option_name
from fastgen.errors import FastgenError
from fastgen.pipelines.schema import METHODS, SCHEMA, SearchSettings, json_schema

RULES = [(method, name) for method in METHODS for name in method.rules()]
WITHOUT = {"height", "width", "negative_prompt", "temperature", "top_k", "top_p", "max_seconds"}


def wrong(name: str) -> list[Any]:
    """Values just outside the range that the JSON Schema of a setting states, and of other types."""
    schema = SCHEMA[name].json_schema()
    found: list[Any] = [True, "x"] if schema["type"] != "string" else ["\0"]
    found += [""] if schema["type"] == "string" and not SCHEMA[name].blank else []
    found += [schema["minimum"] - 1] if "minimum" in schema else []
    found += [schema["maximum"] + 1] if "maximum" in schema else []
    found += [schema[key] for key in ("exclusiveMinimum", "exclusiveMaximum") if key in schema]
    found += [float("nan"), float("inf")] if schema["type"] == "number" else []
    return found + (["none of these"] if "enum" in schema else [])


@pytest.mark.parametrize(("method", "name"), RULES, ids=[name for _, name in RULES])
def test_a_value_out_of_range_is_refused_by_its_name(method: Any, name: str) -> None:
    for value in wrong(name):
        with pytest.raises(FastgenError, match=f"^{name}: "):
            method(**{name: value})
        with pytest.raises(FastgenError, match=f"^{option_name(name)}: "):
            method.of({name: value, "other": 1}, option_name)


def test_only_a_negative_prompt_may_be_blank() -> None:
    """Qwen-Image is guided with a blank one only."""
    (name,) = (name for name, rule in SCHEMA.items() if rule.blank)
    (method,) = (method for method, each in RULES if each == name)
    assert name == "negative_prompt" and method(negative_prompt=" ").negative_prompt == " "


@pytest.mark.parametrize(("method", "name"), RULES, ids=[name for _, name in RULES])
def test_every_setting_is_an_option_in_the_panel_of_its_method(method: Any, name: str) -> None:
    commands = {"generate": typer.main.get_command(generate.app)}
    if name not in WITHOUT:
        commands |= typer.main.get_command(eval_group.app).commands  # type: ignore[attr-defined]
        commands = {key: commands[key] for key in ("generate", "shapes", "geneval", "fid")}
    for key, command in commands.items():
        options = {option.name: option for option in command.params}
        assert options[name].opts == [option_name(name)], key
        assert (options[name].help, options[name].rich_help_panel) == (SCHEMA[name].help, method.panel), key


def test_settings_are_frozen_and_know_what_was_given() -> None:
    settings = SearchSettings.of({"tau": 0.5, "starts": None, "seed": 3})
    assert settings.given() == {"tau": 0.5}
    with pytest.raises(FrozenInstanceError):
        settings.tau = 1.0  # type: ignore[misc]


def test_json_schema_has_every_setting_once() -> None:
    assert list(json_schema()["properties"]) == list(SCHEMA) and len(SCHEMA) == len(RULES)
    assert json_schema(SearchSettings)["properties"]["chains"]["minimum"] == 1
