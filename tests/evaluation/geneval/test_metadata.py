"""Reading and writing GenEval metadata."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from fastgen.evaluation.geneval.metadata import Metadata, format_metadata, read_metadata
from fastgen.evaluation.geneval.prompts import CLASSES, COLORS, METADATA_SHA256, TASKS, official_prompts

# Next to the repository, or next to what holds its work tree.
OFFICIAL = next(
    (
        folder / "shared/data/geneval/evaluation_metadata.jsonl"
        for folder in Path(__file__).resolve().parents
        if (folder / "shared/data/geneval/evaluation_metadata.jsonl").is_file()
    ),
    None,
)
GOOD = {"tag": "two_object", "include": [{"class": "star", "count": 1}, {"class": "ring", "count": 1}], "prompt": "p"}


def included(**clause) -> dict:
    return {**GOOD, "include": [GOOD["include"][0], {**GOOD["include"][1], **clause}]}


def without(key: str) -> dict:
    return {k: v for k, v in GOOD.items() if k != key}


@pytest.mark.skipif(OFFICIAL is None, reason="shared/data/geneval is in no folder above this repository")
def test_official_prompts_equal_the_official_file_byte_for_byte() -> None:
    raw = OFFICIAL.read_bytes()
    assert format_metadata(official_prompts()) == raw
    assert tuple(read_metadata(OFFICIAL, class_names=CLASSES, color_names=COLORS)) == official_prompts()
    assert "".join(f"{name}\n" for name in CLASSES) == (OFFICIAL.parent / "object_names.txt").read_text()


def test_official_prompts() -> None:
    items = official_prompts()
    digest = hashlib.sha256(format_metadata(items)).hexdigest()
    assert digest == METADATA_SHA256 == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    assert len(items) == 553 and len({item.prompt for item in items}) == 553
    starts = {"single_object": 0, "two_object": 80, "counting": 179, "colors": 259, "position": 353, "color_attr": 453}
    assert tuple(starts) == TASKS
    assert {tag: [item.tag for item in items].index(tag) for tag in TASKS} == starts
    assert Counter(item.tag for item in items) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100
    }  # fmt: skip
    assert Counter(item.include[0].count for item in items if item.tag == "counting") == {2: 26, 3: 28, 4: 26}
    assert all(item.exclude[0].count == item.include[0].count + 1 for item in items if item.tag == "counting")
    placed = [item.include[1].position for item in items if item.tag == "position"]
    assert Counter(place[0] for place in placed if place) == {"below": 28, "right of": 27, "above": 26, "left of": 19}
    coloured = [clause for item in items for clause in item.include if clause.color is not None]
    assert {clause.color for clause in coloured} == set(COLORS)
    assert "person" not in {clause.class_name for clause in coloured}


def test_shapesworld_prompts_are_valid_metadata() -> None:
    from fastgen.data.captions import evaluation_prompts
    from fastgen.data.shapes import COLORS, SHAPES
    from fastgen.evaluation.geneval.metadata import check_vocabulary

    items = [Metadata.from_dict(data) for data in evaluation_prompts()]
    for item, data in zip(items, evaluation_prompts(), strict=True):
        check_vocabulary(item, SHAPES, COLORS)
        assert item.as_dict() == data
        assert item.to_json() == json.dumps(data)


def test_write_and_read_back(tmp_path: Path) -> None:
    items = [
        Metadata.from_dict(included(color="red", position=["left of", 0])),
        Metadata.from_dict({**GOOD, "exclude": [{"class": "star", "count": 2}], "prompt": "a “café” \u2028 line"}),
    ]
    path = tmp_path / "m.jsonl"
    path.write_bytes(format_metadata(items))
    assert read_metadata(path) == items
    assert path.read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "JSON object"),
        (without("tag"), "missing tag"),
        (without("prompt"), "missing prompt"),
        (without("include"), "missing include"),
        ({**GOOD, "excludes": []}, "unknown excludes"),
        ({**GOOD, "tag": ""}, "tag"),
        ({**GOOD, "prompt": 3}, "prompt"),
        ({**GOOD, "include": {}}, "include"),
        ({**GOOD, "include": []}, "both empty"),
        ({**GOOD, "include": ["star"]}, r"include\[0\]"),
        (included(colour="red"), "unknown colour"),
        (included(count=0), "count"),
        (included(count=True), "count"),
        (included(count=1.0), "count"),
        (included(color=""), "color"),
        (included(position="left of"), "position"),
        (included(position=["left", 0]), "unknown relation"),
        (included(position=[0, "left of"]), "unknown relation"),
        (included(position=["left of", 1]), r"earlier include clause \(0..0\), got 1"),
        (included(position=["left of", -1]), "earlier"),
        (included(position=["left of", 7]), "earlier"),
        (included(position=["left of", True]), "earlier"),
        ({**GOOD, "include": [{"class": "star", "count": 1, "position": ["above", 0]}]}, "first"),
        ({**GOOD, "exclude": [{"class": "star", "count": 1, "color": "red"}]}, "unknown color"),
        ({**GOOD, "exclude": [{"class": "star"}]}, "missing count"),
    ],
)
def test_malformed_metadata_names_the_line(tmp_path: Path, data, message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(data) + "\n")
    with pytest.raises(ValueError, match=message) as error:
        read_metadata(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "no metadata"),
        (b"\n", "no metadata"),
        (json.dumps(GOOD).encode() + b"\n\n" + json.dumps(GOOD).encode(), ":2: blank line"),
        (json.dumps(GOOD).encode() + b'\n{"tag": ', ":2: the line is not valid JSON"),
        (json.dumps(GOOD).encode() + b"\n\xff", ":2: not UTF-8"),
        (b"[" * 100_000, ":1: "),
    ],
)
def test_malformed_files(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        read_metadata(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        read_metadata(tmp_path / "none.jsonl")


def test_unknown_class_and_colour(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(included(color="mauve")))
    assert len(read_metadata(path)) == 1
    with pytest.raises(ValueError, match=":1: unknown colour 'mauve'; known: red, blue"):
        read_metadata(path, color_names=["red", "blue"])
    with pytest.raises(ValueError, match=":1: unknown class 'ring'"):
        read_metadata(path, class_names=["star"])
