"""Broken images, archives, statistics and results through every command that reads them: one line, or harmless.

Each file is a whole one with damage that a seed decides. A traceback would leave `run` as an exception.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from evaluation_fakes import PixelModel
from PIL import Image

import fastgen.evaluation.geneval.shapes_checker as checker_module
from fastgen.cli.main import run
from fastgen.data.shapes import ShapesWorld

pytestmark = pytest.mark.slow
IMAGES = ShapesWorld(5).batch(4).images


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(buffer, kind)
    return buffer.getvalue()


def npz(compressed: bool) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, arr_0=np.stack(list(IMAGES)))
    return buffer.getvalue()


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            for number in range(3):
                file.writestr(f"{number}.bmp", encoded("BMP"))
                file.writestr(f"{number}.json", json.dumps({"caption": f"image {number}"}))
    else:
        with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as file:
            for number in range(3):
                member = tarfile.TarInfo(f"{number}.png")
                member.size = len(encoded("PNG"))
                file.addfile(member, io.BytesIO(encoded("PNG")))
    return buffer.getvalue()


def statistics(compressed: bool) -> bytes:
    buffer = io.BytesIO()
    record = json.dumps({"taps": ["pool"], "count": 50, "protocol": "shapes", "name": "x", "fingerprint": "y"})
    arrays = {"mu:pool": np.zeros(128), "sigma:pool": np.eye(128), "fastgen": np.array(record)}
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One of the ways in which files break."""
    place, length = rng.randrange(len(data)), rng.choice((1, 4, 50, 500))
    way = rng.randrange(7)
    if way == 0:
        return data[:place]
    if way == 1:
        return data[:place] + bytes(min(length, len(data) - place)) + data[place + length :]
    if way == 2:
        return data[:place] + rng.randbytes(length) + data[place + length :]
    if way == 3:
        return data[:place] + rng.randbytes(length) + data[place:]
    if way == 4:
        return data[:place] + data[place + length :]
    if way == 5:  # sizes and counts are in the heads
        place = rng.randrange(min(80, len(data)))
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    place = len(data) - 1 - rng.randrange(min(120, len(data)))  # and the ends of archives
    return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]


JUNK = (None, True, -1, 0, 1e308, -1e308, 10**40, float("nan"), float("inf"), "", "x", "\0", "é" * 5000, [], {}, [[]])


def changed(text: bytes, rng: random.Random) -> bytes:
    """JSON in which a part is something else, is gone or is there twice."""
    data = json.loads(text)
    place, path = data, []
    while isinstance(place, (dict, list)) and place and (not path or rng.random() < 0.8):
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        path.append((place, key))
        place = place[key]
    holder, key = path[-1]
    if isinstance(holder, list) and rng.random() < 0.3:
        holder.append(holder[key])
    elif rng.random() < 0.25:
        del holder[key]
    else:
        holder[key] = rng.choice(JUNK)
    return json.dumps(data).encode()


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Callable[..., int]:
    """Run a command on a damaged file; the exit status, which is one of `allowed`."""

    def run_on(arguments: list[str], allowed: tuple[int, ...] = (0, 2)) -> int:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            status = run(arguments)
        error = capsys.readouterr().err
        assert status in allowed, error
        if status == 2:
            assert error.startswith("error: ") and error.count("\n") == 1, error
        assert not [warning for warning in raised if issubclass(warning.category, RuntimeWarning)]
        return status

    return run_on


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checker_module, "load_detector", lambda folder=None, device="cpu": PixelModel())
    (tmp_path / "reference").mkdir()
    for number, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"reference/{number}.png")


FID = ["--metrics", "fd-shapes", "--allow-small", "--bootstrap", "0", "--mixed-sizes", "--workers", "1"]
SOURCES: dict[str, tuple[str, bytes]] = {
    "png": ("mine/x.png", encoded("PNG")),
    "jpeg": ("mine/x.jpg", encoded("JPEG")),
    "webp": ("mine/x.webp", encoded("WEBP")),
    "tiff": ("mine/x.tiff", encoded("TIFF")),
    "npz": ("x.npz", npz(False)),
    "compressed npz": ("x.npz", npz(True)),
    "zip": ("x.zip", archive("zip")),
    "tar": ("x.tar", archive("")),
    "gzipped tar": ("x.tgz", archive("gz")),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_images_and_archives_of_a_distance(tmp_path: Path, kind: str, check: Callable[..., int]) -> None:
    name, data = SOURCES[kind]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if path.parent != tmp_path:
        for number in range(2):
            Image.fromarray(IMAGES[number]).save(path.parent / f"{number}.png")
    source = str(path.parent if path.parent != tmp_path else path)
    path.write_bytes(data)
    assert check(["eval", "fid", source, "--reference", "reference", *FID]) == 0
    rng, refused = random.Random(kind), 0
    for _ in range(14):
        path.write_bytes(damaged(data, rng))
        refused += check(["eval", "fid", source, "--reference", "reference", *FID]) == 2
    assert refused >= 1


@pytest.mark.parametrize("compressed", [False, True])
def test_statistics(tmp_path: Path, compressed: bool, check: Callable[..., int]) -> None:
    from fastgen.evaluation.fid.npz import read_statistics

    (tmp_path / "ref.npz").write_bytes(statistics(compressed))
    assert read_statistics(tmp_path / "ref.npz").taps["pool"].count == 50
    rng = random.Random(compressed)
    for _ in range(15):
        (tmp_path / "ref.npz").write_bytes(damaged(statistics(compressed), rng))
        check(["eval", "fid", "reference", "--reference", "ref.npz", *FID])


def test_images_and_metadata_of_geneval(tmp_path: Path, check: Callable[..., int]) -> None:
    made = ["eval", "geneval", "--detector", "shapes", "--model", "renders", "--limit", "1"]
    assert run([*made, "--images-per-prompt", "1", "--no-self-test", "--out", "run"]) == 0
    command = ["eval", "geneval", "--detector", "shapes", "--no-self-test", "--images", "run"]
    rng = random.Random(3)
    for name in ("00001/samples/0000.png", "00002/metadata.jsonl"):
        path = tmp_path / "run" / name
        whole = path.read_bytes()
        for number in range(20):
            path.write_bytes(changed(whole, rng) if path.suffix == ".jsonl" and number % 2 else damaged(whole, rng))
            check(command)
        path.write_bytes(whole)
    assert check(command) == 0


def test_results(tmp_path: Path, check: Callable[..., int]) -> None:
    """Through compare and report, and verdicts through the summary."""
    made = ["eval", "shapes", "--model", "renders", "--limit", "2", "--images-per-prompt", "2", "--out", "run"]
    assert run([*made, "--allow-small"]) == 0
    scores, rng, refused = (tmp_path / "run/scores.json").read_bytes(), random.Random(4), 0
    pages = [part for kind in ("html", "md", "csv") for part in ("-o", f"r.{kind}")]
    for number in range(80):
        Path("run/bad.json").write_bytes(damaged(scores, rng) if number % 4 == 0 else changed(scores, rng))
        refused += check(["eval", "compare", "run/scores.json", "run/bad.json", "--prove"], (0, 2, 3)) == 2
        check(["eval", "report", "run/bad.json", *pages])
    assert refused >= 30
    lines = (tmp_path / "run/results.jsonl").read_bytes().splitlines(keepends=True)
    for number in range(40):
        line = rng.randrange(len(lines))
        bad = damaged(lines[line], rng) if number % 2 else changed(lines[line], rng)
        (tmp_path / "run/results.jsonl").write_bytes(
            b"".join([*lines[:line], bad.rstrip() + b"\n", *lines[line + 1 :]])
        )
        check(["eval", "geneval", "--results", "run/results.jsonl"])
        check(["eval", "report", "run/scores.json", *pages])
