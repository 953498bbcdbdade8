"""GenEval prompt metadata: one JSON object per line with tag, include, optional exclude, and prompt.

The same schema serves the official prompts, ShapesWorld and any file of a user. Reading validates everything, since a
misspelt key would otherwise make a clause silently easier.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.errors import FastgenError
from fastgen.io import parse_json

RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True, slots=True)
class Clause:
    """One demand: `count` objects of `class_name`, perhaps of a colour, perhaps placed relative to another clause.

    Attributes:
        class_name: class of the object.
        count: >= 1; the least number in an include clause, one more than is allowed in an exclude clause.
        color: demanded colour, include clauses only.
        position: (relation, index of an earlier include clause), include clauses only.
    """

    class_name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The clause in the key order of the official file."""
        out: dict[str, Any] = {"class": self.class_name, "count": self.count}
        if self.color is not None:
            out["color"] = self.color
        if self.position is not None:
            out["position"] = list(self.position)
        return out


@dataclass(frozen=True, slots=True)
class Metadata:
    """One prompt and what a correct picture of it must and must not contain.

    Attributes:
        tag: name of the task; results are averaged per tag.
        include: clauses that must be true.
        exclude: clauses that must not be reached; (class_name, count) only.
        prompt: the text.
    """

    tag: str
    include: tuple[Clause, ...]
    prompt: str
    exclude: tuple[Clause, ...] = ()

    @classmethod
    def from_dict(cls, data: Any) -> Metadata:
        """Validated metadata of one parsed JSON object.

        Raises:
            ValueError: a key is missing or unknown, a value has the wrong type or range, or a position points at
                the clause itself, at a later one or nowhere.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"needs a JSON object, got {type(data).__name__}")
        _check_keys(data, "the object", required=("tag", "include", "prompt"), optional=("exclude",))
        tag, prompt = (_text(data[key], key) for key in ("tag", "prompt"))
        include = [_clause(item, f"include[{i}]", i) for i, item in enumerate(_list(data["include"], "include"))]
        exclude = [_clause(item, f"exclude[{i}]") for i, item in enumerate(_list(data.get("exclude", []), "exclude"))]
        if not include and not exclude:
            raise ValueError("include and exclude are both empty: any picture would be correct")
        return cls(tag=tag, include=tuple(include), prompt=prompt, exclude=tuple(exclude))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready dict in the key order of the official file (exclude only when there is one)."""
        out: dict[str, Any] = {"tag": self.tag, "include": [clause.as_dict() for clause in self.include]}
        if self.exclude:
            out["exclude"] = [clause.as_dict() for clause in self.exclude]
        out["prompt"] = self.prompt
        return out

    def to_json(self) -> str:
        """One line, equal byte for byte to the official line of the same prompt."""
        return json.dumps(self.as_dict())


def read_metadata(
    path: str | Path, *, class_names: Collection[str] | None = None, color_names: Collection[str] | None = None
) -> list[Metadata]:
    """Metadata of every line of `path`.

    Args:
        class_names: the classes the detector knows; None accepts any.
        color_names: the colours the classifier knows; None accepts any.

    Raises:
        FastgenError: the file is missing, not UTF-8 or empty, or a line is blank, malformed, names an unknown class
            or colour, or asks a task for a prompt again; the message starts with `path:line`.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].count(b"\n")
        raise FastgenError(f"{path}:{before + 1}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise FastgenError(f"{path}: cannot read the metadata: {error.strerror or error}") from error
    # Only "\n" ends a line: str.splitlines would also cut inside a JSON string at U+2028 and the like.
    lines = text.removesuffix("\n").split("\n")
    if not text.strip():
        raise FastgenError(f"{path}: has no metadata")
    out = []
    for number, line in enumerate(lines, start=1):
        try:
            if not line.strip():
                raise ValueError("blank line")
            metadata = Metadata.from_dict(parse_json(line, "the line"))
            check_vocabulary(metadata, class_names, color_names)
        except ValueError as error:  # FastgenError is one
            raise FastgenError(f"{path}:{number}: {error}") from error
        out.append(metadata)
    check_distinct(out, [f"{path}:{number}" for number in range(1, len(out) + 1)])
    return out


def check_distinct(prompts: Sequence[Metadata], places: Sequence[object]) -> None:
    """Refuse a prompt that a task asks for twice: it would be drawn from the same noise, or counted as two.

    Raises:
        FastgenError: begins with the second place and names the first.
    """
    first: dict[tuple[str, str], object] = {}
    for item, place in zip(prompts, places, strict=True):
        if (before := first.setdefault((item.tag, item.prompt), place)) is not place:
            raise FastgenError(f"{place}: {item.prompt!r} is already in {before}; a task needs each prompt once")


def format_metadata(items: Iterable[Metadata]) -> bytes:
    """The bytes of a metadata file: one JSON object per line."""
    return "".join(item.to_json() + "\n" for item in items).encode("utf-8")


def first_of_each_task(prompts: Sequence[Metadata], limit: int | None) -> list[Metadata]:
    """The first `limit` prompts of each task, tasks in order of appearance; all when None."""
    tags = dict.fromkeys(prompt.tag for prompt in prompts)
    return [prompt for tag in tags for prompt in [other for other in prompts if other.tag == tag][:limit]]


def check_vocabulary(
    metadata: Metadata, class_names: Collection[str] | None, color_names: Collection[str] | None
) -> None:
    """ValueError if a clause names a class or colour that cannot be detected; None accepts any."""
    for clause in (*metadata.include, *metadata.exclude):
        if class_names is not None and clause.class_name not in class_names:
            raise ValueError(f"unknown class {clause.class_name!r}; known: {', '.join(class_names)}")
        if color_names is not None and clause.color is not None and clause.color not in color_names:
            raise ValueError(f"unknown colour {clause.color!r}; known: {', '.join(color_names)}")


def _clause(data: Any, where: str, index: int | None = None) -> Clause:
    """A validated clause; `index` is its place in include, None for an exclude clause."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: needs a JSON object, got {type(data).__name__}")
    optional = ("color", "position") if index is not None else ()
    _check_keys(data, where, required=("class", "count"), optional=optional)
    count = data["count"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{where}.count: needs an integer >= 1, got {count!r}")
    color = _text(data["color"], f"{where}.color") if "color" in data else None
    position = None
    if "position" in data and index is not None:
        position = _position(data["position"], f"{where}.position", index)
    return Clause(_text(data["class"], f"{where}.class"), count, color, position)


def _position(value: Any, where: str, index: int) -> tuple[str, int]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{where}: needs [relation, index of a clause], got {value!r}")
    relation, target = value
    if relation not in RELATIONS:
        raise ValueError(f"{where}: unknown relation {relation!r}; known: {', '.join(RELATIONS)}")
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < index:
        allowed = f"0..{index - 1}" if index else "none, as this clause is the first"
        raise ValueError(f"{where}: needs the index of an earlier include clause ({allowed}), got {target!r}")
    return relation, target


def _check_keys(data: Mapping[str, Any], where: str, required: Sequence[str], optional: Sequence[str]) -> None:
    missing = [key for key in required if key not in data]
    unknown = [key for key in data if key not in required and key not in optional]
    if missing or unknown:
        problems = [f"{what} {', '.join(keys)}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise ValueError(f"{where}: {' and '.join(problems)}; keys are {', '.join((*required, *optional))}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: needs non-empty text, got {value!r}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: needs a list, got {type(value).__name__}")
    return list(value)
