"""Other processes of tests. They find these functions by name; those of a test module they would not find."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fastgen.errors import FastgenError
from fastgen.locks import locked_files, locked_folder

_SPAWN = multiprocessing.get_context("spawn")


def _hold(kind: str, argument: Any, pipe: Connection) -> None:
    try:
        with locked_folder(*argument) if kind == "folder" else locked_files(argument):
            pipe.send("held")
            pipe.recv()
    except FastgenError as error:
        pipe.send(str(error))


@contextmanager
def other(kind: str, argument: Any) -> Iterator[tuple[str, Any]]:
    """Another process that takes a lock: what came of it, and the process."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_hold, args=(kind, argument, theirs))
    process.start()
    try:
        assert ours in wait([ours, process.sentinel], 60), "the other process ended or said nothing"
        yield ours.recv(), process
    finally:
        ours.close()
        process.kill()
        process.join()


def brightness(images: Any, prompts: list[str]) -> Any:
    """A verifier that another process finds by its name."""
    return images.float().mean(dim=(1, 2, 3)) / 255


def draw_pictures(pipe: Any, call: dict[str, Any]) -> Any:
    """Pictures of a pipeline, always of the same seed."""
    import torch

    return pipe(generator=torch.Generator().manual_seed(0), **call).images


def _draw_pickled(folder: Path) -> dict[str, Any]:
    return {file.name: draw_pictures(*pickle.loads(file.read_bytes())) for file in folder.iterdir()}


def drawn_elsewhere(folder: Path) -> dict[str, Any]:
    """Pictures that another process draws with the pipelines and calls that were pickled into a folder, by file."""
    with ProcessPoolExecutor(1, mp_context=_SPAWN) as pool:
        return pool.submit(_draw_pickled, folder).result()
