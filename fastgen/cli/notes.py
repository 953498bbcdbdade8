"""Warnings, which are also in the record, and progress while pictures are made, on stderr."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from fastgen.accounting import add_note, is_in

__all__ = ["Notes", "measuring", "progress", "quiet_libraries", "warnings_shown"]

# Said better by `fastgen.pipelines.prompts`.
_REPEATED = ("truncated because CLIP can only handle", "Token indices sequence length is longer")


class Notes(logging.Handler):
    """Shows each line once, and adds it to the notes of open accounts.

    Attributes:
        texts: the lines, in order.
    """

    def __init__(self, shown: bool = True) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        self._shown = shown

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(line.strip() for line in record.getMessage().splitlines())
        # What libraries say while they load is of no use here.
        if not any(part in text for part in _REPEATED) and (record.name.startswith("fastgen") or not is_in("load")):
            add_note(text)
            self.show(text)

    def show(self, text: str) -> None:
        """One line, unless it was shown before."""
        if text not in self.texts:
            self.texts.append(text)
            if self._shown:
                typer.echo(f"note: {text}", err=True)


@contextmanager
def warnings_shown(shown: bool = True) -> Iterator[Notes]:
    """Inside, warnings of fastgen, diffusers and transformers are noted; `shown` False prints none of them."""
    notes = Notes(shown)
    loggers = [logging.getLogger(name) for name in ("fastgen", "diffusers", "transformers")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    try:
        for logger in loggers:
            verbose = logger.name == "fastgen" and logger.level == logging.INFO  # fastgen.cli.panels
            logger.handlers, logger.propagate = [notes, *(logger.handlers if verbose else [])], False
            logger.setLevel(logging.INFO if verbose else logging.WARNING)
        yield notes
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


@contextmanager
def measuring() -> Iterator[Notes]:
    """Around a benchmark: stdout is for its result, and what the user should know of its pictures is shown."""
    with contextlib.redirect_stdout(sys.stderr):
        quiet_libraries()
        with warnings_shown() as notes:
            yield notes


def quiet_libraries() -> None:
    """No progress bars, no advice; their warnings are shown by `warnings_shown`."""
    import fastgen.pipelines  # noqa: F401  # repairs a torchvision of another torch, before its users load

    # isort: split
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


@contextmanager
def progress(shown: bool = True) -> Iterator[Callable[[str, float, int], None]]:
    """Progress bars with the time left, on stderr and only on a terminal; yields the callback."""
    if not shown or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: float, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield update
