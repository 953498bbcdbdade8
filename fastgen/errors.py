"""Errors that a user can act on. A leaf: imports nothing."""

from __future__ import annotations


class FastgenError(ValueError):
    """A mistake or a condition that the user can correct; the message is one line.

    The message names the argument or the file, the value that was given and what is allowed. The command line
    prints it as ``error: <message>`` without a traceback and exits with code 2. It is a `ValueError`, so code that
    uses the library needs no fastgen import to catch it.
    """


class NotFiniteError(FastgenError):
    """Latents, logits, pixels or scores came out as NaN or infinity, so there is no picture to return.

    Typical causes: float16 weights that overflow, broken weights, a guidance scale far outside the usual range.
    """


def one_line(error: BaseException) -> str:
    """What an error of a library says, without line breaks and at most 300 characters."""
    return " ".join(str(error).split())[:300]
