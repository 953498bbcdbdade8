"""The `fastgen` command itself: finding sub-commands, help, errors and exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer

import fastgen
from fastgen.cli import main as cli
from fastgen.cli.main import COMMANDS, run
from fastgen.errors import FastgenError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that puts `action` in the place of `fastgen info`."""
    monkeypatch.delenv("FASTGEN_DEBUG", raising=False)

    def install(action: Any) -> None:
        module = types.ModuleType("fastgen_test_command")
        module.app = typer.Typer(add_completion=False)  # type: ignore[attr-defined]
        module.app.command()(action)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "info", (module.__name__, "help"))

    return install


def raising(error: BaseException) -> Any:
    def action() -> None:
        raise error

    return action


def one_spelling(text: str) -> str:
    """With an unknown option named as one version of click does it: the others put quotes around it, or no colon."""
    return re.sub(r"No such option:? '?(--[\w-]+)'?", r"No such option: \1", text)


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.strip()


def test_help_lists_every_command_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (_, line) in COMMANDS.items():
        assert name in text
        assert line.split(".")[0] in text
    assert list(COMMANDS) == ["generate", "eval", "bench", "serve", "tune", "train", "models", "info"]


def test_help_imports_no_command_and_no_heavy_package() -> None:
    code = (
        "import sys\n"
        "from fastgen.cli.main import COMMANDS, run\n"
        "assert run(['--help']) == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', *(module for module, _ in COMMANDS.values())}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_without_loading_torch(name: str) -> None:
    code = (
        "import sys\n"
        "from fastgen.cli.main import run\n"
        f"assert run(['{name}', '--help']) == 0\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert done.stderr.strip() == "False"
    assert "--install-completion" not in done.stdout
    assert f"fastgen {name}" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"fastgen {fastgen.__version__}\n"


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code = run([])
    assert code in (0, 2)  # typer's releases differ
    assert "generate" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generat"], "error: No such command 'generat'. Did you mean 'generate'? (see fastgen --help)"),
        (["--loud"], "error: No such option: --loud (see fastgen --help)"),
        (["info", "--loud"], "error: No such option: --loud (see fastgen info --help)"),
    ],
)
def test_usage_errors_are_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(args) == 2
    assert one_spelling(one_error_line(capsys)) == message


@pytest.mark.parametrize("error", [FastgenError, ValueError, TypeError])
def test_user_errors_are_one_line(error: type[Exception], command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command(raising(error("steps: 0 is not allowed;\n    needs >= 1")))
    assert run(["info"]) == 2
    assert one_error_line(capsys) == "error: steps: 0 is not allowed; needs >= 1"


def test_system_errors_are_one_line(command: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def action() -> None:
        (tmp_path / "absent.txt").read_bytes()

    command(action)
    assert run(["info"]) == 2
    assert "No such file or directory" in one_error_line(capsys)


def test_an_error_without_a_message_names_its_type(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command(raising(FastgenError()))
    assert run(["info"]) == 2
    assert one_error_line(capsys) == "error: FastgenError"


def fails_in_c_type() -> None:
    len(None)  # type: ignore[arg-type]


def fails_in_c_value() -> None:
    int("seven")


def fails_in_a_call() -> None:
    [].index(3)


@pytest.mark.parametrize("action", [fails_in_c_type, fails_in_c_value, fails_in_a_call, raising(RuntimeError("bug"))])
def test_bugs_keep_their_traceback(action: Any, command: Any) -> None:
    command(action)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        run(["info"])


def reraises() -> None:
    try:
        int("seven")
    except ValueError as error:
        raise ValueError("seed: 'seven' is not a whole number") from error


def raises_through_finally() -> None:
    try:
        raise ValueError("seed: 'seven' is not a whole number")
    finally:
        str(0)


@pytest.mark.parametrize("action", [reraises, raises_through_finally])
def test_a_raise_statement_makes_a_user_error_however_it_travels(
    action: Any, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command(action)
    assert run(["info"]) == 2
    assert one_error_line(capsys) == "error: seed: 'seven' is not a whole number"


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_debug_shows_the_traceback(
    value: str, shown: bool, command: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(raising(FastgenError("model: 'tyni' is unknown")))
    monkeypatch.setenv("FASTGEN_DEBUG", value)
    assert run(["info"]) == 2
    err = capsys.readouterr().err
    assert ("Traceback" in err) == shown
    assert err.endswith("error: model: 'tyni' is unknown\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_interrupts_are_one_line(error: BaseException, command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command(raising(error))
    assert run(["info"]) == 130
    assert one_error_line(capsys) == "error: interrupted"


@pytest.mark.parametrize("code", [0, 1, 7])
def test_exit_codes_of_commands_pass(code: int, command: Any) -> None:
    command(raising(typer.Exit(code)))
    assert run(["info"]) == code
    command(raising(SystemExit(code)))
    assert run(["info"]) == code


def test_a_wrong_option_value_is_one_line(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def action(steps: Annotated[int, typer.Option("--steps")] = 1) -> None:
        typer.echo(steps)

    command(action)
    assert run(["info", "--steps", "many"]) == 2
    assert "--steps" in one_error_line(capsys)
    assert run(["info", "--steps", "3"]) == 0
    assert capsys.readouterr().out == "3\n"


@pytest.mark.parametrize("write", ["typer.echo('x' * 10_000_000)", "print('x')"])  # now, and when stdout is flushed
def test_a_closed_pipe_is_no_error(write: str) -> None:
    code = (
        "import sys, types, typer\n"
        "from fastgen.cli import main\n"
        "module = types.ModuleType('command')\n"
        "module.app = typer.Typer(add_completion=False)\n"
        "@module.app.command()\n"
        "def action():\n"
        "    sys.stdin.readline()\n"
        f"    {write}\n"
        "sys.modules['command'] = module\n"
        "main.COMMANDS['info'] = ('command', 'help')\n"
        "sys.exit(main.run(['info']))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen([sys.executable, "-c", code], **pipes, text=True, env=buffered) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.write("the reader is gone\n")
        process.stdin.close()
        err = process.stderr.read()
        code_seen = process.wait(timeout=300)
    assert err == ""
    assert code_seen == 141


def test_the_installed_script_exits_with_the_code() -> None:
    script = Path(sys.executable).with_name("fastgen")
    if not script.exists():
        pytest.skip("fastgen is not installed as a script here")
    done = subprocess.run([script, "--no-such-option"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    # Some releases of typer name options that look alike.
    assert re.fullmatch(
        r"error: No such option: --no-such-option( \(.*\))? \(see fastgen --help\)\n", one_spelling(done.stderr)
    )


@pytest.mark.slow
def test_an_error_after_the_libraries_are_loaded_is_the_only_line() -> None:
    """transformers warns while it is imported where torchvision is missing."""
    words = ["generate", "a red circle", "--method", "search", "--policy", "luck", "--max-nfe", "48"]
    done = subprocess.run([sys.executable, "-m", "fastgen", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: policy: 'luck'") and done.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
@pytest.mark.parametrize("name", ["kernels", "dc-speed", "speculative-cost", "speculative"])
def test_benchmarks_refuse_a_device_that_is_not_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", name, "--device", "cuda"]) == 2
    assert "device: 'cuda' cannot be used" in one_error_line(capsys)
