"""The `fastgen` command: finds the sub-command, loads only that one, and turns errors into one line and an exit code.

Exit codes: 0 done, 2 a mistake the user can fix (one line on stderr), 130 interrupted, 1 a bug (with its traceback).
``FASTGEN_DEBUG=1`` shows the traceback of every error.
"""

from __future__ import annotations

import dis
import errno
import functools
import importlib
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import fastgen
from fastgen.cli.panels import arrange
from fastgen.errors import FastgenError

# Name -> module with an `app`, and the help line. They are here so that `fastgen --help` imports none of the modules.
COMMANDS = {
    "generate": ("fastgen.cli.generate", "Make pictures from a prompt or from a file of prompts."),
    "eval": ("fastgen.cli.eval", "Score images or a model: GenEval, FID and their relatives."),
    "bench": ("fastgen.cli.bench", "Measure speed and memory; writes JSON."),
    "serve": ("fastgen.cli.serve", "Serve pictures over HTTP, with a web page."),
    "tune": ("fastgen.cli.tune", "Measure what makes a model faster here, and write a plan."),
    "train": ("fastgen.cli.train", "Train the embedded models with their recipes."),
    "models": ("fastgen.cli.models", "Show which method works with which model."),
    "info": ("fastgen.cli.info", "Show versions, devices and which fast paths are available."),
}

# typer carries its own copy of click in some releases and imports click in others: reach its base error through typer.
ClickException: type[Any] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


#: Characters of an error that are shown.
_LONGEST = 1500


class Interrupted(BaseException):
    """Ctrl-C inside a command. Releases of typer turn a KeyboardInterrupt into different things; this passes."""


class LazyGroup(TyperGroup):
    """A group that knows its commands by name and help line, and imports the one that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, (_, text) in COMMANDS.items():
            self.commands[name] = TyperCommand(name=name, help=text)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted from error

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            command = typer.main.get_command(importlib.import_module(COMMANDS[name][0]).app)
            # typer offers shell completion on every app, but only a program's outermost one can install it.
            completion = ("install_completion", "show_completion")
            command.params = [parameter for parameter in command.params if parameter.name not in completion]
            for word, leaf in getattr(command, "commands", {name: command}).items():
                arrange(name if leaf is command else f"{name} {word}", leaf)
                leaf.callback = _checked(leaf)
        return name, command, rest


def _checked(command: Any) -> Any:
    """The function of a command, called only with values that some option could mean."""
    from fastgen.checks import check_integer, check_number

    act = command.callback
    labels = {parameter.name: max(parameter.opts, key=len) for parameter in command.params}
    repeated = {p.name for p in command.params if getattr(p, "multiple", False) or p.nargs == -1}

    @functools.wraps(act)
    def checked(*args: Any, **values: Any) -> Any:
        for name, value in values.items():
            label = labels.get(name, name)
            for part in value if isinstance(value, list | tuple) else [value]:
                if isinstance(part, str | os.PathLike):
                    _check_text(label, os.fspath(part), blank=name == "negative_prompt")
                elif isinstance(part, float):
                    check_number(label, part)
                elif isinstance(part, int) and not isinstance(part, bool) and not 0 <= part < 2**31:
                    # Seeds check their own, larger range.
                    check_integer(label, part, 0, 2**63 - 1 if name == "seed" else 2**31 - 1)
            if name in repeated and value:
                values[name] = list(dict.fromkeys(value))  # a repeated value is one row of a result
        return act(*args, **values)

    return checked


def _check_text(label: str, text: str, blank: bool = False) -> None:
    # A blank negative prompt requests guidance without a text from some models (Qwen-Image).
    if not text.strip() and not blank:
        raise FastgenError(f"{label}: an empty text is not allowed")
    # Lone surrogates are what Python makes of bytes that the locale cannot decode.
    if any("\ud800" <= char <= "\udfff" or (char < " " and char not in "\t\n\r") for char in text):
        raise FastgenError(
            f"{label}: {ascii(text)} is not text: it contains control characters, or bytes that the locale "
            f"({sys.getfilesystemencoding()}) cannot decode"
        )


app = typer.Typer(
    name="fastgen",
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain: importing rich takes longer than everything else in `fastgen --help`
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"fastgen {fastgen.__version__}")
        raise typer.Exit()


@app.callback()
def _fastgen(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Image generation with diffusers and transformers models, faster at known quality."""


def _raised_on_purpose(error: BaseException) -> bool:
    """Whether a `raise` statement made the error, not an operation that went wrong.

    ``raise ValueError("steps: …")`` is written for the user. ``len(None)`` is a TypeError too, but a bug, and a bug
    must keep its traceback.
    """
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def _fail(error: BaseException, message: str, code: int) -> int:
    if os.environ.get("FASTGEN_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    # Messages of other libraries run over several lines; ours is one, also where a value is very long.
    line = " ".join(message.split()) or type(error).__name__
    typer.echo(f"error: {line if len(line) <= _LONGEST else line[:_LONGEST] + '…'}", err=True)
    return code


def _is_broken_pipe(error: BaseException) -> bool:
    cause = error.__context__
    return isinstance(cause, OSError) and cause.errno == errno.EPIPE


def _drop_stdout() -> None:
    """Discard the rest of the buffer, which has no reader: Python would report an error when it flushes it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """Open the standard streams that were closed when the process started.

    Otherwise the next file that is opened, perhaps a picture, takes their numbers, and what a library prints goes into
    it. A closed standard output is a pipe without a reader: printing ends in exit code 141.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if sys.stdout is None:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        for number in {reader, writer} - {1}:
            os.close(number)
        sys.stdout = open(1, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _refuse_blank(args: Sequence[str]) -> None:
    """Refuse an option with an empty value: as a path it would be the working directory."""
    for option, value in zip(args, [*args, "-"][1:], strict=True):
        if option.startswith("-") and (value == "" or re.fullmatch(r"--[\w-]+=", option)):
            raise FastgenError(f"{option.rstrip('=')}: an empty text is not allowed")


def _explain(error: Exception, loaded: int) -> str | None:
    """The message for an error that the user can fix; None for a bug."""
    if isinstance(error, FastgenError | OSError):
        return str(error)
    if isinstance(error, ValueError | TypeError) and _raised_on_purpose(error):
        return str(error)
    generation = sys.modules.get("fastgen.pipelines.generation")
    fault = None if generation is None else generation.model_fault(error, loaded)  # in a model that the user brought
    return None if fault is None else str(fault)


def run(args: Sequence[str]) -> int:
    """Run the command line `args` (without the program's name) and return the exit code.

    Raises:
        Exception: a bug in fastgen or in a library it calls; the traceback is the report.
    """
    generation = sys.modules.get("fastgen.pipelines.generation")
    loaded = generation.loaded_models() if generation is not None else 0
    try:
        _refuse_blank(args)
        result = typer.main.get_command(app).main(args=list(args), prog_name="fastgen", standalone_mode=False)
        sys.stdout.flush()  # so that a closed pipe is noticed here
        return result if isinstance(result, int) else 0
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:
        return _fail(error, "interrupted", 130)
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not _is_broken_pipe(error):
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        _drop_stdout()  # the reader (`| head`) is done; typer exits with 1 if it notices first
        return 141
    except ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a group called without a command
            error.show()
            return 2
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return _fail(error, error.format_message().rstrip(".") + hint, 2)
    except Exception as error:
        message = _explain(error, loaded)
        if message is None:
            raise
        if isinstance(error, OSError) and error.filename is None and error.errno == errno.ENOSPC:
            _drop_stdout()
        return _fail(error, message, 2)


def main() -> None:
    """Entry point of the `fastgen` script."""
    # What transformers notes while it is imported is suppressed; an error of ours is one line.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that the locale cannot show end no run
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
