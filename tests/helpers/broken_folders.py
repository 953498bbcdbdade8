"""Copies of a model's folder with one thing in them broken, the same for the same seed."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from killed import command

MEMORY = 6 << 30
CPU_SECONDS = 60  # which do not depend on what else the machine does

_DEEP = "[" * 100_000 + "]" * 100_000
_RAW = {"<1e400>": "1e400", "<-1e400>": "-1e400", "<deep>": _DEEP, "<digits>": "9" * 5000, "<half>": '"\\ud800"'}

HOSTILE: tuple[Any, ...] = (
    *(-1, 0, 1, 3, 10**9, 2**31, 10**30, -(10**9), 0.5, -0.5, 1e-300, 1e300, float("nan")),
    *("", "a string", "../../nowhere", "/", "a\0b", "x" * 70_000, None, True, False),
    *([], [[]], [10**9], [None], ["x"] * 3, {}, {"a": 1}, {"a": {"b": []}}, *_RAW),
)

TEMPLATES = (
    "{% for i in range(10000000000) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'x' * 2000000000 }}",
    "{{ 9 ** 999999999 }}",
    "{% if false %}{{ 'x'|center(2000000000) }}{% endif %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{{ '%*d' % (2000000000, 5) }}",
    "{{ lipsum(n=100000000) }}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{{ messages",
    "{{ nothing.at.all }}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__ }}",
    "",
)


def copies(folder: Path, target: Path, count: int, seed: int) -> Iterator[tuple[str, Path]]:
    """`count` broken copies: what was done, and the folder, which the caller removes."""
    randoms = random.Random(seed)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for number in range(count):
        # Every file has its turn before one comes again.
        name = files[number % len(files)]
        copy = target / f"model-{number}"
        shutil.copytree(folder, copy, copy_function=os.link)
        done = _break(copy / name, randoms)
        yield f"{name}: {done}", copy


def _break(file: Path, randoms: random.Random) -> str:
    data = file.read_bytes()
    file.unlink()  # a link to the original
    kinds: list[Callable[[Path, bytes, random.Random], str]] = [_spoil]
    if file.suffix == ".json":
        kinds = [_set, _set, _set, _set, _change, _change, _delete, _spoil]
    elif file.suffix == ".safetensors":
        kinds = [_header, _header, _header, _spoil]
    elif file.suffix == ".jinja":
        kinds = [_template, _spoil]
    return randoms.choice(kinds)(file, data, randoms)


def _spoil(file: Path, data: bytes, randoms: random.Random) -> str:
    how = randoms.choice(["truncate", "empty", "garbage", "folder", "missing", "longer"])
    if how == "folder":
        file.mkdir()
    elif how != "missing":
        cut = randoms.randrange(len(data) or 1)
        file.write_bytes(
            {"truncate": data[:cut], "empty": b"", "garbage": randoms.randbytes(200), "longer": data + b"\0}"}[how]
        )
    return how


def _set(file: Path, data: bytes, randoms: random.Random) -> str:
    root = json.loads(data)
    holder, key = _place(root, randoms)
    if key == "chat_template" or "tokenizer_config" in file.name and randoms.random() < 0.3:
        key, value = "chat_template", randoms.choice(TEMPLATES)
        holder = root
    else:
        value = randoms.choice(HOSTILE)
    if holder is None:
        root = value
    else:
        holder[key] = value
    text = json.dumps(root)
    for name, raw in _RAW.items():
        text = text.replace(json.dumps(name), raw)
    file.write_text(text, encoding="utf-8")
    return f"{key} = {str(value)[:60]!r}"


def _change(file: Path, data: bytes, randoms: random.Random) -> str:
    """A value of the right kind, or nearly: another number, a list of another length, its text."""
    root = json.loads(data)
    holder, key = _place(root, randoms)
    if holder is None:
        return "nothing"
    value = holder[key]
    if isinstance(value, (bool, str)) or value is None:
        changed = randoms.choice([not value, [value], str(value), f"{value}2", 1])
    elif isinstance(value, (int, float)):
        changed = randoms.choice(
            [-value, value * 1000, value + 1, value / 3, value // 2, str(value), [value] * 3, True]
        )
    elif isinstance(value, list):
        changed = randoms.choice([value[:-1], value * 2, value[::-1], value * 5000, [value], value[:1] or [0]])
    else:
        changed = randoms.choice([list(value), {**value, "other": value}, {}, str(value)])
    holder[key] = changed
    file.write_text(json.dumps(root), encoding="utf-8")
    return f"{key} from {str(value)[:30]!r} to {str(changed)[:30]!r}"


def _delete(file: Path, data: bytes, randoms: random.Random) -> str:
    root = json.loads(data)
    holder, key = _place(root, randoms)
    if holder is not None:
        del holder[key]
    file.write_text(json.dumps(root), encoding="utf-8")
    return f"without {key}"


def _template(file: Path, data: bytes, randoms: random.Random) -> str:
    text = randoms.choice(TEMPLATES)
    file.write_text(text, encoding="utf-8")
    return text


def _header(file: Path, data: bytes, randoms: random.Random) -> str:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = randoms.choice(sorted(header.keys() - {"__metadata__"}))
    how = randoms.choice(["dtype", "shape", "rename", "drop", "offsets", "entry", "length"])
    entry = header[name]
    if how == "dtype":
        entry["dtype"] = randoms.choice(["F16", "I64", "BOOL", "X9", None, 5])
    elif how == "shape":
        entry["shape"] = randoms.choice([[], [10**9], [-1], entry["shape"][::-1], [0], None, "x", [1.5], [1, 2, 3]])
    elif how == "rename":
        header[f"{name}.other"] = header.pop(name)
    elif how == "drop":
        del header[name]
    elif how == "offsets":
        entry["data_offsets"] = randoms.choice([[0, 0], [5, 1], [-4, 4], [0, 10**15], None, ["a", "b"], [0]])
    elif how == "entry":
        header[name] = randoms.choice([None, [], {}, 5, "x"])
    encoded = json.dumps(header).encode()
    stated = randoms.choice([2**63, 2**40, 0, 1]) if how == "length" else len(encoded)
    file.write_bytes(struct.pack("<Q", stated) + encoded + data[8 + length :])
    return f"header: {how} of {name}: {header.get(name)}"


def _place(root: Any, randoms: random.Random) -> tuple[Any, Any]:
    """A container and a key in it, at a random depth; (None, None) for the whole."""
    if randoms.random() < 0.05 or not isinstance(root, (dict, list)) or not root:
        return None, None
    while True:
        key = randoms.choice(sorted(root) if isinstance(root, dict) else range(len(root)))
        inner = root[key]
        if not (isinstance(inner, (dict, list)) and inner) or randoms.random() < 0.4:
            return root, key
        root = inner


def generate(place: str, arguments: list[str]) -> None:
    """In a process of its own, which cannot take the machine's memory."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    command(Path(place), arguments)
