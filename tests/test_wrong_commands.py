"""Wrong command lines of every command: one line of error, exit status 2, nothing read, nothing written.

The commands and their options are those of the app itself, so that a new option is tried too. The lines run in this
process through the entry point of the `fastgen` script.
"""

from __future__ import annotations

import importlib
import inspect
import os
import random
import signal
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from fastgen.cli import main as cli

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs POSIX signals"),
]

# Command lines that begin to work: each wrong line is one of them with one fault.
STARTS: dict[str, list[str]] = {
    "generate": ["a red circle", "-o", "new/x.png"],
    "eval shapes": ["--model", "tiny", "--limit", "1", "--out", "new"],
    "eval geneval": ["--model", "tiny", "--detector", "shapes", "--limit", "1", "--out", "new"],
    "eval fid": ["--model", "tiny", "--limit", "1", "--run", "new", "--cache", "cache"],
    "train vae": ["--steps", "2", "-o", "new"],
}
for _name in ("dc", "speculative", "search"):
    STARTS[f"bench {_name}"] = ["--folder", "new"]
METHODS = {
    "(speculative": ["--method", "speculative"],
    "(search": ["--method", "search", "--max-nfe", "48"],
    "(dynamic chunking": ["--method", "dc", "--model", "small-dc"],
}

LONG = "1" + "0" * 5000
TEXTS = ["", "a\x07b", "caf\udce9"]
WRONG: dict[type, list[str]] = {
    int: ["many", "", "1.5", "nan", "-7", "0x10", LONG, f"-{LONG}", "9" * 40],
    float: ["many", "", "nan", "inf", "-inf", LONG, "1e999", "0,5"],
    Path: [*TEXTS, "x" * 300],
    str: TEXTS,
}
#: Options of words -> words that they do not know.
WORDS = {
    "device": ["meta", "xpu", "cuda:99", "cpu:x", "CPU"],
    "dtype": ["int8", "float64"],
    "method": ["fast", "DC"],
    "policy": ["luck"],
    "tree": ["chain-0", "4-x", "jacobi-0", "9999-9999", f"chain-{LONG}", f"jacobi-{LONG}"],
    "acceptance": ["all"],
    "sampler": ["euler"],
    "preview": ["half"],
    "verifier": ["judge", "shapes-verifier:", "/absent"],
    "drafter": ["/absent", "owner/absent", "tiny"],
    "model": ["tyni", "/absent", "absent/", "owner/absent", "owner/absent/x", "pyproject.toml"],
    "detector": ["owner/absent", "/absent"],
    "metadata": ["/absent"],
    "prompts_file": ["/absent"],
    "variant": ["fp 16", "../fp16"],
    "model_variant": ["fp 16", "../fp16"],
    "protocol": ["own"],
    "metrics": ["own", ","],
    "extractor": ["own"],
    "weights": ["inception", "own=x", "inception="],
    "precision": ["int8"],
    "output": ["/dev/null/x/y.png"],
    "out": ["/dev/null/x/y.json"],
    "run": ["/dev/null/x"],
    "folder": ["/dev/null/x"],
    "share": ["1.5", "0/0", "9/8", "a/b"],
    **dict.fromkeys(("batch", "batch_size", "images_per_prompt", "limit", "num_images", "runs", "steps"), ["0"]),
}
#: Whole lines: options that contradict each other, or that the model does not take.
CONTRADICTIONS = {
    "generate": [
        [],
        ["a ring", "--prompts-file", "x.txt"],
        ["a ring", "a cube"],
        ["a ring", "--method", "dc", "--model", "tiny"],
        ["a ring", "--method", "base", "--model", "small-dc"],
        ["a ring", "--method", "speculative", "--model", "tiny"],
        ["a ring", "--method", "search", "--max-nfe", "48", "--model", "tiny-janus"],
        ["a ring", "--method", "search", "--max-nfe", "1"],
        ["a ring", "--method", "search"],
        ["a ring", "--method", "dc", "--token-budget", "3", "--tail-drop", "0.1"],
        ["a ring", "--method", "dc", "--token-budget", "100000"],
        ["a ring", "--method", "dc", "--token-budget", "257"],
        ["a ring", "--token-budget", "3"],
        ["a ring", "--tail-drop", "0.3"],
        ["a ring", "--save-map"],
        ["a ring", "--save-tree"],
        ["a ring", "--compile"],
        ["a ring", "--drafter", "none"],
        ["a ring", "--quality", "0.5", "--method", "speculative"],
        ["a ring", "--steps", "3", "--method", "speculative"],
        ["a ring", "--height", "65"],
        ["a ring", "--height", "100000"],
        ["a ring", "--top-k", "3"],
        ["a ring", "--num-images", str(10**12)],
        ["a ring", "--seed", str(2**63), "--num-images", "2"],
        ["a ring", "--tree", "chain-4", "--drafter", "none", "--method", "speculative"],
    ],
    "eval shapes": [
        ["--images", "/absent"],
        ["--images", ".", "--model", "tiny"],
        ["--images", ".", "--steps", "3"],
        ["--model", "tiny", "--token-budget", "3"],
        ["--model", "tiny", "--tail-drop", "0.3"],
        ["--model", "tiny", "--uncond-tail-drop", "0.3"],
        ["--model", "small-dc", "--token-budget", "257"],
        ["--model", "small-dc", "--token-budget", "3", "--tail-drop", "0.3"],
        ["--model", "tiny-janus", "--steps", "3"],
        ["--model", "renders", "--method", "dc"],
        ["--model", "renders", "--token-budget", "3"],
        ["--sheet", "x.jpg"],
    ],
    "eval geneval": [
        ["--detector", "shapes", *line]
        for line in (
            [],
            ["--model", "tiny", "--images", "."],
            ["--model", "tiny", "--token-budget", "3"],
            ["--model", "tiny", "--tail-drop", "0.3"],
            ["--model", "small-dc", "--token-budget", "257"],
            ["--results", "/absent"],
            ["--images", ".", "--seed", "x"],
        )
    ],
    "eval fid": [
        [],
        ["/absent"],
        [".", "--model", "tiny"],
        ["--model", "tiny", "--token-budget", "3"],
        ["--model", "tiny", "--tail-drop", "0.3"],
        ["--model", "small-dc", "--token-budget", "257"],
        ["--model", "tiny", "--out", "x.txt"],
        ["--model", "tiny", "--reference-protocol", "adm"],
    ],
    "eval compare": [["/absent", "/absent"], ["."], []],
    "eval report": [["/absent", "--out", "x.html"], [".", "--out", "x.pdf"], ["/absent"], []],
    "train vae": [[]],
    "train cascade-calibrate": [["-o", "new"]],
    "train search-calibrate": [["-o", "new"]],
    "train dc": [["-o", "new"]],
}


class Started(BaseException):
    """The command began to work."""


def commands() -> dict[str, Any]:
    """All commands by their words."""
    found = {}
    for name, (module, _) in cli.COMMANDS.items():
        command = typer.main.get_command(importlib.import_module(module).app)
        for word, leaf in getattr(command, "commands", {"": command}).items():
            found[f"{name} {word}".strip()] = leaf
    return found


def kind_of(hint: Any) -> type:
    """The type of one value of an option."""
    for inner in typing.get_args(hint):
        if inner is not type(None):
            return kind_of(inner)
    return hint if isinstance(hint, type) else str


def wrong_lines(name: str, command: Any) -> Iterator[list[str]]:
    """Wrong words after the command's own."""
    start = STARTS.get(name, [])
    hints = typing.get_type_hints(inspect.unwrap(command.callback))
    yield [*start, "--no-such-option"]
    yield [*start, "-Z"]
    yield [*start, "--no-such-option=1", "--json"]
    yield [*start, "one", "too", "many"] if name != "eval report" else ["--nothing"]
    for parameter in command.params:
        if parameter.name not in hints:
            continue  # --help, and the completion of shells
        kind = kind_of(hints[parameter.name])
        is_option = parameter.opts[0].startswith("-")
        method = [words for mark, words in METHODS.items() if mark in (getattr(parameter, "help", "") or "")]
        begin = [*start, *(method[0] if method and "--method" in str([p.opts for p in command.params]) else [])]
        option = max(parameter.opts, key=len)
        if kind is bool:
            yield [*begin, f"{option}=maybe"]
            continue
        if is_option:
            yield [*begin, option]
        for value in [*WRONG[kind], *WORDS.get(parameter.name, [])]:
            if is_option:
                yield [*begin, f"{option}={value}"]
            elif name in STARTS and begin and not begin[0].startswith("-"):
                yield [value, *begin[1:]]
    yield from CONTRADICTIONS.get(name, [])
    generator = random.Random(name)  # pairs: the first fault must not hide a traceback of the second
    singles = [[f"{p.opts[0]}={generator.choice(WRONG[str])}"] for p in command.params if p.opts[0].startswith("--")]
    for _ in range(3):
        if len(singles) > 1:
            yield [*start, *sum(generator.sample(singles, 2), [])]


COMMANDS = commands()


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The empty working directory of a command that can neither make a network nor take long."""

    def started(*args: object, **kwargs: object) -> None:
        raise Started("a network was made")

    def late(*args: object) -> None:
        raise Started("it took long")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTGEN_DEBUG", raising=False)
    for module in ("fastgen.pipelines.loading.loader", "fastgen.training.engine", "fastgen.pipelines.noise_search"):
        importlib.import_module(module)  # before networks are forbidden
    monkeypatch.setattr(torch.nn.Module, "__init__", started)
    monkeypatch.setattr("subprocess.Popen.__init__", started)
    before = signal.signal(signal.SIGALRM, late)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fault(words: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """Empty where the line ends as it should."""
    sys.argv = ["fastgen", *words]
    signal.alarm(20)
    try:
        cli.main()
        ending: object = "returned"
    except SystemExit as error:
        ending = error.code
    except BaseException as error:
        ending = f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.alarm(0)
    out, err = capsys.readouterr()
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    lines = err.splitlines()
    one = len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 3000
    if ending == 2 and one and not out and not found:
        return ""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return f"{ascii(words)[:150]}: ends with {ending}, {err[-300:]!r}, {out[:50]!r}, wrote {found}"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_wrong_command_is_exactly_one_line(
    name: str, guarded: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    lines = list(wrong_lines(name, COMMANDS[name]))
    faults = [text for line in lines if (text := fault([*name.split(), *line], capsys, guarded))]
    if "FASTGEN_FUZZ_LOG" in os.environ:
        with open(os.environ["FASTGEN_FUZZ_LOG"], "a") as log:
            print(f"## {name}: {len(lines)} lines, {len(faults)} faults", *faults, sep="\n", file=log)
    assert not faults, f"{len(faults)} of {len(lines)} lines:\n" + "\n".join(faults)


def test_there_are_hundreds_of_lines() -> None:
    assert sum(len(list(wrong_lines(name, command))) for name, command in COMMANDS.items()) >= 300
