"""Atomic writes: whole or not at all, whatever fails and whenever."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import fastgen.io as fio
from fastgen.errors import FastgenError


def test_bytes_and_json_and_png(tmp_path: Path) -> None:
    fio.atomic_write_bytes(tmp_path / "a.bin", b"\x00data")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00data"
    fio.atomic_write_json(tmp_path / "a.json", {"é": [1, None, "x"]})
    assert fio.read_json(tmp_path / "a.json") == {"é": [1, None, "x"]}
    image = Image.new("RGB", (3, 2), (1, 2, 3))
    fio.save_png(tmp_path / "a.png", image, {"Comment": "größer ☃"})
    with Image.open(tmp_path / "a.png") as back:
        assert back.size == (3, 2) and back.getpixel((2, 1)) == (1, 2, 3)
        assert back.text["Comment"] == "größer ☃"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.json", "a.png"]


def test_png_bytes_are_reproducible() -> None:
    image = Image.new("RGB", (4, 4), (9, 8, 7))
    assert fio.encode_png(image, {"Comment": "x"}) == fio.encode_png(image.copy(), {"Comment": "x"})


def test_replaces_and_honours_the_umask(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    before = os.umask(0o027)
    try:
        fio.atomic_write_bytes(target, b"new")
    finally:
        os.umask(before)
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_nan_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="[Nn]a[Nn]|JSON"):
        fio.atomic_write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_symbolic_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    fio.atomic_write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.parametrize("special", ["folder", "device"])
def test_only_regular_files_are_replaced(tmp_path: Path, special: str) -> None:
    target = tmp_path if special == "folder" else Path(os.devnull)
    with pytest.raises(FastgenError, match="folder|regular"):
        fio.atomic_write_bytes(target, b"x")
    assert not Path(os.devnull).is_file()


def fail_in(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    """Let the next write fail in write(), fsync() or os.replace()."""
    if where == "write":

        class Full(io.FileIO):
            def write(self, data: Any) -> int:
                raise error

        def open_full(descriptor: int, mode: str) -> Any:
            return io.BufferedWriter(Full(descriptor, mode))

        monkeypatch.setattr(fio, "open", open_full, raising=False)
        return

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(fio.os, where, fail)


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
@pytest.mark.parametrize("exists", [False, True])
def test_disk_full_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, exists: bool) -> None:
    target = tmp_path / "out.png"
    if exists:
        target.write_bytes(b"old")
    with monkeypatch.context() as patch:
        fail_in(patch, where, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(FastgenError) as caught:
            fio.atomic_write_bytes(target, b"x" * 100_000)
    assert "\n" not in str(caught.value)
    assert str(target) in str(caught.value) and "no space" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == (["out.png"] if exists else [])
    if exists:
        assert target.read_bytes() == b"old"


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_interrupt_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    fail_in(monkeypatch, where, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fio.atomic_write_bytes(tmp_path / "a", b"x")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_many_files_are_all_staged_before_the_first_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    calls = []
    real = os.fsync

    def second_fails(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "full")
        real(descriptor)

    monkeypatch.setattr(fio.os, "fsync", second_fails)
    with pytest.raises(FastgenError, match="b: no space"):
        fio.atomic_write_many([(tmp_path / "a", b"new"), (tmp_path / "b", b"new")])
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", range(4))
def test_an_interrupt_leaves_all_files_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int, number: signal.Signals
) -> None:
    """A real signal after one of the steps: a file is on the disk (0, 1), a file is renamed (2, 3)."""
    steps = iter(range(4))

    def then_signal(real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            real(*arguments)
            if next(steps, None) == when:
                signal.raise_signal(number)

        return call

    names = ["00000.json", "00000.png"]
    before = signal.signal(number, signal.default_int_handler)  # scripts ignore SIGINT in what runs in the background
    try:
        with monkeypatch.context() as patch:
            patch.setattr(fio, "_write_synced", then_signal(fio._write_synced))
            patch.setattr(fio.os, "replace", then_signal(os.replace))
            with pytest.raises(KeyboardInterrupt):
                fio.atomic_write_many([(tmp_path / name, b"new") for name in names])
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ([] if when < 2 else names)


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        fio.atomic_write_bytes(tmp_path / "a", b"new")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_real_size_limit(tmp_path: Path) -> None:
    """A real failing write, by a limit on the size of files, in a process of its own."""
    code = (
        "import resource, sys, fastgen.io as fio\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    fio.atomic_write_bytes(sys.argv[1], b'x' * 100_000)\n"
        "except fio.FastgenError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, timeout=120, check=True
    )
    assert "size limit" in done.stdout and done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_and_file_as_folder(tmp_path: Path) -> None:
    with pytest.raises(FastgenError, match="does not exist"):
        fio.atomic_write_bytes(tmp_path / "no" / "a", b"")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FastgenError, match="a file"):
        fio.atomic_write_bytes(tmp_path / "file" / "a", b"")
    with pytest.raises(FastgenError, match="file"):
        fio.check_writable(tmp_path / "file")
    with pytest.raises(FastgenError, match="not writable"):
        fio.check_writable(tmp_path / "file" / "sub")
    assert fio.check_writable(tmp_path / "new" / "sub").is_dir()
    assert list((tmp_path / "new" / "sub").iterdir()) == []


@pytest.mark.parametrize("names", [None, ["00000.png", "00000.json"]])
def test_a_kill_inside_any_write_leaves_nothing_that_the_next_run_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str] | None
) -> None:
    with monkeypatch.context() as killed:
        # A killed process removes and renames nothing.
        killed.setattr(Path, "unlink", lambda *args, **kwargs: None)
        killed.setattr(os, "replace", lambda *args, **kwargs: None)
        fio.check_writable(tmp_path)
        fio.atomic_write_many([(tmp_path / "00000.png", b"picture"), (tmp_path / "00000.json", b"{}")])
    assert len([path for path in tmp_path.iterdir() if path.suffix == ".tmp"]) == 3
    foreign = tmp_path / ".of another program.tmp"
    foreign.touch()
    fio.check_writable(tmp_path)
    fio.remove_leftovers(tmp_path, names)
    assert list(tmp_path.iterdir()) == [foreign]


@pytest.mark.parametrize("create", [True, False])
def test_a_kill_inside_the_check_leaves_nothing_once_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, create: bool
) -> None:
    folder = tmp_path if create else tmp_path / "missing" / "sub"
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", lambda *args, **kwargs: None)
        fio.check_writable(folder, create=create)
    assert list(tmp_path.iterdir())
    fio.check_writable(folder, create=create)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_read_json_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(FastgenError, match="bad.json"):
        fio.read_json(tmp_path / "bad.json")
    with pytest.raises(FastgenError, match="none.json"):
        fio.read_json(tmp_path / "none.json")


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, fastgen.io, fastgen.cli.plan; print([m for m in ('torch', 'PIL', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []


def test_digest_of_a_file(tmp_path: Path) -> None:
    import hashlib

    data = bytes(range(256)) * 9000  # more than one piece
    (tmp_path / "a.bin").write_bytes(data)
    assert fio.file_sha256(tmp_path / "a.bin") == hashlib.sha256(data).hexdigest()
    with pytest.raises(FastgenError, match="cannot read .*none.bin: the folder does not exist"):
        fio.file_sha256(tmp_path / "none.bin")


# --- JSON from anybody ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested"),
        ("[" * 65 + "]" * 65, "more than 64 levels"),
        ("[" * 64 + "{}" + "]" * 64, "more than 64 levels"),
        ("9" * 5000, "digits"),
        ("[-" + "1" * 101 + "]", "an integer of 102 digits"),
        ('"\\ud800"', "surrogates not allowed"),
        ('{"\\uDFFF": 1}', "surrogates not allowed"),
        (b"\xff\xfe", "utf-8"),
        (b"", "Expecting value"),
        ("{'a': 1}", "property name"),
    ],
)
def test_json_that_is_invalid_or_too_large_is_one_line(text: str | bytes, message: str) -> None:
    with pytest.raises(FastgenError, match=f"^x.json is not valid JSON: .*{message}") as error:
        fio.parse_json(text, "x.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 64 + "]" * 64, "1" * 100, '"\\ud83d\\ude00 \\\\ud800"', '{"a": [1e30, null]}'])
def test_json_that_is_unusual_but_whole_is_read(text: str) -> None:
    assert fio.parse_json(text, "x") == json.loads(text)


def test_files_that_are_none_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    for name, message in (
        ("pipe", "not a regular file"),
        ("large", "has 11 bytes, at most 10"),
        ("none", "no such file"),
    ):
        with pytest.raises(FastgenError, match=f"^cannot read .*{name}: .*{message}"):
            fio.read_limited(tmp_path / name, 10)
