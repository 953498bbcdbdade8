"""Translate errors of the Hub and the libraries to one line with the model and what helps. Imports neither torch nor
diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

from fastgen.errors import FastgenError, one_line

__all__ = ["explained", "fault", "is_out_of_memory"]


@contextmanager
def explained(
    what: str, failed: str = "cannot be loaded", *, hub_id: str | None = None, use: str = ""
) -> Iterator[None]:
    """Errors inside become one `FastgenError` of one line: `what` ("checkpoint FOLDER", "lora: FILE" …) and what
    `failed`. `hub_id`: of what may come from the Hub, and `use`: what to do with its folder after `hf download`."""
    try:
        yield
    except FastgenError:
        raise
    except Exception as error:
        raise fault(what, error, failed, hub_id, use) from error


def fault(
    what: str, error: Exception, failed: str = "cannot be loaded", hub_id: str | None = None, use: str = ""
) -> FastgenError:
    """The line of `explained`. Loaders wrap the Hub's error in their own; the innermost one says what happened."""
    for cause in reversed(_chain(error)):
        if is_out_of_memory(cause):
            return FastgenError(f"{what} does not fit into memory")
        if isinstance(cause, UnpicklingError):
            return FastgenError(f"{what}: a weight file is no archive of tensors, or is corrupt")
        if hub_id is not None and (said := _of_hub(hub_id, cause, use or "pass its folder as the model")):
            return FastgenError(f"{what} {said}")
    text = one_line(error)
    return FastgenError(f"{what} {failed}: {type(error).__name__}{': ' if text else ''}{text}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether device memory or main memory (for which torch raises a plain RuntimeError) is exhausted."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "not enough memory" in str(error))
    )


def _chain(error: BaseException | None) -> list[Exception]:
    found: list[Exception] = []
    while isinstance(error, Exception) and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _of_hub(hub_id: str, error: Exception, use: str) -> str:
    """The answer of the Hub and what helps; empty for other errors."""
    from huggingface_hub import errors

    said = one_line(error) or type(error).__name__
    # The last kind is whatever the HTTP library of the day raises without a connection.
    lines: list[tuple[tuple[type[Exception], ...], str]] = [
        ((errors.GatedRepoError,), "is gated: accept its terms on its Hub page and log in with `hf auth login`"),
        ((errors.RevisionNotFoundError,), "has no such revision on the Hub"),
        ((errors.RepositoryNotFoundError,), "is not on the Hub, or private: check the name, or `hf auth login`"),
        ((errors.RemoteEntryNotFoundError,), f"lacks a file on the Hub: {said}"),
        ((errors.HFValidationError,), "is neither a folder or file that exists nor a Hub id"),
        (
            (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError),
            f"is not in the local cache and the Hub cannot be reached: run `hf download {hub_id}` on a machine with a "
            f"connection, then {use}",
        ),
        ((errors.HfHubHTTPError,), f"cannot be had, the Hub answered: {said}"),
        ((OSError,), f"cannot be downloaded: {said}"),
    ]
    offline = "onnect" in type(error).__name__ or "Timeout" in type(error).__name__
    found = (line for kinds, line in lines if isinstance(error, kinds) or (offline and ConnectionError in kinds))
    return next(found, "")
