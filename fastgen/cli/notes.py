"""What libraries warn of while pictures are made reaches the user: one line on stderr, each only once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer

__all__ = ["warnings_shown"]

# Said better by `fastgen.pipelines.prompts`.
_REPEATED = ("truncated because CLIP can only handle", "Token indices sequence length is longer")


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen = set(_REPEATED)

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if not any(seen in text for seen in self._seen):
            self._seen.add(text)
            typer.echo(f"note: {text}", err=True)


@contextmanager
def warnings_shown() -> Iterator[None]:
    """Inside, warnings of fastgen, diffusers and transformers are printed; what is said while loading is no news."""
    notes = _Notes()
    loggers = [logging.getLogger(name) for name in ("fastgen", "diffusers", "transformers")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    try:
        for logger in loggers:
            logger.handlers, logger.propagate = [notes], False
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
