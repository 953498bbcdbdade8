"""Pictures with captions as training data: every layout holds the same items, and what cannot be used is named."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.training.pictures import Pictures, open_data

COUNT = 5
CAPTIONS = [f"picture {index} of a café" for index in range(COUNT)]
Write = Callable[[Path, list[bytes]], Path]


def png(width: int, height: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def members(pictures: list[bytes], kind: str) -> dict[str, bytes]:
    """Names and contents of pictures with their captions."""
    found: dict[str, bytes] = {}
    for index, data in enumerate(pictures):
        caption = CAPTIONS[index]
        found[f"{index}.png"] = data
        found[f"{index}.{kind}"] = (json.dumps({"caption": caption}) if kind == "json" else caption).encode()
    return found


def folder(kind: str) -> Write:
    def write(path: Path, pictures: list[bytes]) -> Path:
        path.mkdir()
        for name, data in members(pictures, kind).items():
            (path / name).write_bytes(data)
        return path

    return write


def image_folder(path: Path, pictures: list[bytes]) -> Path:
    path.mkdir()
    for index, data in enumerate(pictures):
        (path / f"{index}.png").write_bytes(data)
    lines = [json.dumps({"file_name": f"{index}.png", "text": CAPTIONS[index]}) for index in range(len(pictures))]
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def shards(path: Path, pictures: list[bytes]) -> Path:
    path.mkdir()
    for shard, names in enumerate((range(2), range(2, len(pictures)))):
        with tarfile.open(path / f"{shard:05}.tar", "w") as tar:
            for name, data in members(pictures, "txt").items():
                if int(name.split(".")[0]) in names:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path


def zipped(path: Path, pictures: list[bytes]) -> Path:
    path = path.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members(pictures, "txt").items():
            file.writestr(name, data)
    return path


LAYOUTS: dict[str, Write] = {
    "txt": folder("txt"),
    "json": folder("json"),
    "metadata": image_folder,
    "shards": shards,
    "zip": zipped,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_pictures_and_captions(layout: str, tmp_path: Path) -> None:
    pictures = [png(20 + index, 24 - index, index) for index in range(COUNT)]
    data = Pictures(LAYOUTS[layout](tmp_path / "data", pictures), 20)
    expected = Pictures(folder("txt")(tmp_path / "plain", pictures), 20)
    for start in (0, 3, COUNT, 4 * COUNT + 1):
        drawn, captions = data.batch(start, COUNT)
        same, texts = expected.batch(start, COUNT)
        assert drawn.shape == (COUNT, 20, 20, 3) and drawn.dtype == torch.uint8
        assert torch.equal(drawn, same) and captions == texts
    again: Any = pickle.loads(pickle.dumps(data))
    assert again.identity == data.identity and torch.equal(again.batch(7, 2)[0], data.batch(7, 2)[0])


def test_every_pass_shows_every_picture_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    data = Pictures(folder("txt")(tmp_path / "data", [png(8, 8, index) for index in range(COUNT)]), 8)
    orders = [data.batch(turn * COUNT, COUNT)[1] for turn in range(8)]
    assert all(sorted(order) == CAPTIONS for order in orders) and len({tuple(order) for order in orders}) > 1


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = folder("txt")(tmp_path / "data", [png(16, 16, 0), png(16, 12, 1), png(16, 16, 2)])
    with pytest.raises(FastgenError, match=r"1\.png: has 16x12 pixels, needs 16 or more"):
        Pictures(path, 16)
    with pytest.raises(FastgenError, match=r"holds no samples\.json; pictures need --size"):
        open_data(path, 0, None)
    for size in (0, -1, 1.5):
        with pytest.raises((FastgenError, TypeError), match="size"):
            Pictures(path, size)  # type: ignore[arg-type]
    (path / "2.txt").unlink()
    with pytest.raises(FastgenError, match="not all of its 3 pictures have a caption"):
        Pictures(path, 12)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FastgenError, match="empty"):
        Pictures(tmp_path / "empty", 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--size"),
        (("--size", "24"), "has 16x16 pixels, needs 24"),
        (("--size", "12"), "12 is not allowed"),
        (("--size", "0"), "size"),
    ],
)
def test_a_command_refuses_data_before_weights_load(
    micro_z: Path, tmp_path: Path, capsys: Any, options: tuple[str, ...], message: str
) -> None:
    path = folder("txt")(tmp_path / "data", [png(16, 16, index) for index in range(2)])
    words = ["train", "dc-patch", "-o", str(tmp_path / "run"), "--part", str(micro_z), "--data", str(path)]
    assert run([*words, *options, "--steps", "1"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "run").exists()
