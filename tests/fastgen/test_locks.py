"""One run at a time in a folder, held by processes that end in any way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from other_process import other

from fastgen.errors import FastgenError
from fastgen.io import atomic_write_bytes
from fastgen.locks import locked_files, locked_folder

Lock = Callable[[Path], Any]
FOLDER: Lock = lambda folder: locked_folder(folder)  # noqa: E731
FILE: Lock = lambda folder: locked_files([folder / "a.png", folder / "b.png"])  # noqa: E731


@pytest.mark.parametrize(
    ("kind", "name", "lock", "refused"),
    [
        ("folder", None, FOLDER, True),
        ("folder", None, FILE, True),
        ("files", "a.png", FOLDER, True),
        ("files", "a.png", FILE, True),
        ("files", "b.png", FILE, True),
        ("files", "c.png", FILE, False),
    ],
)
def test_who_keeps_whom_out(tmp_path: Path, kind: str, name: str | None, lock: Lock, refused: bool) -> None:
    argument = (tmp_path,) if name is None else [tmp_path / name]
    with other(kind, argument) as (said, process):
        assert said == "held"
        if refused:
            with pytest.raises(FastgenError, match="in use by another run") as error, lock(tmp_path):
                pass
            assert "\n" not in str(error.value)
        else:
            with lock(tmp_path):
                pass
        process.kill()  # SIGKILL: nothing of the process's own can run
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with lock(tmp_path):  # no stale lock
            pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_of_a_file_goes_with_the_next_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of that file only, and not while another run may be writing it."""
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", lambda *args, **kwargs: None)
        killed.setattr(os, "replace", lambda *args, **kwargs: None)
        for name in ("a.png", "c.png"):
            atomic_write_bytes(tmp_path / name, b"picture")
    with other("files", [tmp_path / "b.png"]), pytest.raises(FastgenError, match="in use"), FILE(tmp_path):
        pass
    assert len([*tmp_path.glob(".*.tmp")]) == 2
    with FILE(tmp_path):
        assert [path.name[:7] for path in tmp_path.glob(".*.tmp")] == [".c.png."]


def test_further_processes_of_a_run_share_its_folder_and_outlive_it(tmp_path: Path) -> None:
    with locked_folder(tmp_path), other("folder", (tmp_path, 1)) as (said, _), ExitStack() as stack:
        assert said == "held"
        stack.enter_context(locked_folder(tmp_path))  # once more in this process
    with other("folder", (tmp_path, 3)) as (said, _):
        assert said == "held"
        with pytest.raises(FastgenError, match="in use"), locked_folder(tmp_path):
            pass


def test_a_process_may_hold_a_folder_and_its_files(tmp_path: Path) -> None:
    with locked_files([tmp_path / "scores.json"]), locked_folder(tmp_path):
        with other("files", [tmp_path / "x"]) as (said, _):
            assert "in use by another run (process" in said
        with locked_folder(tmp_path):
            pass
        with other("folder", (tmp_path,)) as (said, _):  # the inner lock's end gives nothing back
            assert "in use by another run" in said
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_used_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno
    import fcntl

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with locked_folder(tmp_path), locked_files([tmp_path / "a"]):
        pass
    assert "make sure that no other run writes there" in caplog.text


GENERATE = ["generate", "a red circle", "--steps", "1", "--device", "cpu", "--model"]
EVAL = ["--model", "renders", "--limit", "1", "--images-per-prompt", "1"]
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "generate into a folder": ("folder", [*GENERATE, "MICRO", "-o", "out"]),
    "generate a file": ("folder", [*GENERATE, "MICRO", "-o", "out/a.png"]),
    "generate the same file": ("files", [*GENERATE, "MICRO", "-o", "out/a.png"]),
    "generate several files": ("files", [*GENERATE, "MICRO", "-o", "out/a.png", "--num-images", "2"]),
    "eval shapes": ("folder", ["eval", "shapes", *EVAL, "--out", "out"]),
    "eval geneval": ("folder", ["eval", "geneval", "--detector", "shapes", "--no-self-test", *EVAL, "--out", "out"]),
    "eval fid": ("folder", ["eval", "fid", *EVAL, "--allow-small", "--run", "out"]),
    "eval fid, its result": ("files", ["eval", "fid", *EVAL, "--allow-small", "--out", "out/a.json"]),
    "train": ("folder", ["train", "detector", "--steps", "1", "--batch-size", "1", "-o", "out"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_writes_refuses_a_place_in_use(
    tmp_path: Path, micro_z: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastgen.cli.main import run

    kind, arguments = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "out"
    place.mkdir()
    files = [place / "a.json"] if "json" in arguments[-1] else [place / "a.png", place / "a-1.png"]
    with other(kind, (place,) if kind == "folder" else files) as (said, _):
        assert said == "held"
        assert run([str(micro_z) if part == "MICRO" else part for part in arguments]) == 2
        error = capsys.readouterr().err
        assert "out is in use by another run" in error and error.count("error: ") == 1
        assert [path.name for path in place.rglob("*")] == [".fastgen.lock"]


@pytest.mark.parametrize("name", ["eval shapes", "eval geneval", "eval fid"])
def test_a_run_keeps_its_folder_until_its_result_is_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fastgen.io
    from fastgen.cli.main import run

    write, heard = fastgen.io.atomic_write_json, []

    def asked(path: Path, data: Any) -> None:
        with other("folder", (tmp_path / "out",)) as (said, _):
            heard.append(said)
        write(path, data)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    for module in ("fastgen.io", "fastgen.evaluation.geneval.scoring"):
        monkeypatch.setattr(f"{module}.atomic_write_json", asked)
    (tmp_path / "reference").mkdir()
    arguments = COMMANDS[name][1]
    if name == "eval fid":
        assert run(["eval", "shapes", *EVAL, "--seed", "3", "--out", "reference"]) == 0
        heard.clear()
        arguments = [*arguments, "--reference", "reference", "--bootstrap", "0", "--out", "result.json"]
    assert run(arguments) == 0
    assert len(heard) == 1 and "out is in use by another run" in heard[0]
    capsys.readouterr()
    with locked_folder(tmp_path / "out"):
        pass
