"""The schema of result files, checked before they are compared or reported.

Everything that is checked here is named in the error by its place in the file, e.g. ``tasks.counting.score``. A result
whose numbers contradict each other was edited or damaged, and a gate that read it would pass or fail by accident.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeVar

from fastgen.checks import check_choice, check_integer, check_number
from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.rules import clustered_error

__all__ = ["check_result"]

_Kind = TypeVar("_Kind", dict[str, Any], list[Any])

_CLOSE = 1e-6  # sums of the same numbers in another order
_MAX_COUNT = 10**12
_MAX_VALUE = 1e12  # of a distance, in either direction
_CONTAINERS: dict[str, type] = {
    **dict.fromkeys(("judge", "settings", "environment", "tasks", "metrics"), dict),
    "rows": list,
}
_SHARES = ("precision", "recall")
_ANY_SIGN = ("kid", "kd-", "cmmd", "clip-score")  # unbiased estimates may fall below zero


def check_result(data: dict[str, Any]) -> None:
    """Check a result of `fastgen eval` or `fastgen bench`.

    Raises:
        FastgenError: a field is missing, of another type, out of range, or contradicts others; the message begins with
            the name of the field.
    """
    _text(data, "benchmark", "", required=True)
    for name in ("detector_name", "detector", "images", "partial", "differs", "model"):
        _text(data, name, "")
    for name, kind in _CONTAINERS.items():
        if name in data:
            _container(data, name, "", kind)
    if "environment" in data:
        _check_environment(data["environment"])
    if data.get("seconds_per_image") is not None:
        check_number("seconds_per_image", data["seconds_per_image"], 1e-9, 1e9)
    check_integer("n_images", data.get("n_images", 1), 1, _MAX_COUNT)
    if "tasks" in data or "overall" in data:
        _check_scores(data)
    if data.get("fd_shapes") is not None:
        distance = _object(data, "fd_shapes", "")
        _text(distance, "protocol", "fd_shapes.", required=True)
        if _field(distance, "value", "fd_shapes.") is not None:
            _check_metric("fd-shapes", {**distance, "better": "lower"}, "fd_shapes.")
    for name, metric in (data.get("metrics") or {}).items():
        where = f"metrics.{name}."
        _text(_object(data["metrics"], name, "metrics."), "label", where, required=True)
        _check_metric(name, metric, where)


def _check_environment(data: dict[str, Any]) -> None:
    """What a report says of the machine."""
    where = "environment."
    for name in ("date", "cpu"):
        _text(data, name, where, required=True)
    _field(data, "commit", where)  # None outside a source tree
    _text(data, "commit", where)
    check_integer(f"{where}threads", _field(data, "threads", where), 1, _MAX_COUNT)
    for name in _object(data, "versions", where):
        _text(data["versions"], name, f"{where}versions.")
    gpus = _field(data, "gpus", where)
    if not isinstance(gpus, list) or not all(isinstance(name, str) for name in gpus):
        raise FastgenError(f"{where}gpus: needs a list of names, got {gpus!r}"[:200])


# --- scores --------------------------------------------------------------------------------------------------------


def _check_scores(data: dict[str, Any]) -> None:
    tasks = _object(data, "tasks", "")
    if not tasks:
        raise FastgenError("tasks: is empty")
    for tag in tasks:
        where = f"tasks.{tag}."
        task = _object(tasks, tag, "tasks.")
        _share(task, "score", where)
        _error(task, "stderr", where)
        images = _count(task, "n_images", where)
        if _count(task, "n_prompts", where) > images:
            raise FastgenError(f"{where}n_prompts: {task['n_prompts']} prompts have {images} images")
    for name in ("overall", "correct_images", "correct_prompts"):
        _share(data, name, "")
    _error(data, "overall_stderr", "")
    for name in ("n_images", "n_prompts"):
        _count(data, name, "")
        _agree(name, data[name], sum(task[name] for task in tasks.values()), "the sum of the tasks")
    _agree("overall", data["overall"], _mean(task["score"] for task in tasks.values()), "the mean of the tasks")
    right = sum(task["score"] * task["n_images"] for task in tasks.values()) / data["n_images"]
    _agree("correct_images", data["correct_images"], right, "the scores of the tasks")
    errors = [task["stderr"] for task in tasks.values()]
    if (data["overall_stderr"] is None) != (None in errors):
        raise FastgenError("overall_stderr: needs a number just where every task has one")
    if None not in errors:
        _agree("overall_stderr", data["overall_stderr"], math.hypot(*errors) / len(errors), "the errors of the tasks")
    if data.get("prompts") is not None:
        _check_prompts(data, tasks)


def _check_prompts(data: dict[str, Any], tasks: dict[str, Any]) -> None:
    rows = _container(data, "prompts", "", list)
    by_tag: dict[str, list[tuple[int, int]]] = {tag: [] for tag in tasks}
    seen: set[tuple[str, str]] = set()
    for number, row in enumerate(rows):
        where = f"prompts[{number}]"
        if not isinstance(row, dict):
            raise FastgenError(f"{where}: needs an object, got {type(row).__name__}")
        tag = check_choice(f"{where}.tag", _field(row, "tag", f"{where}."), list(tasks))
        key = (tag, _text(row, "prompt", f"{where}.", required=True))
        if key in seen:
            raise FastgenError(f"{where}.prompt: {key[1]!r} is there twice in task {tag}")
        seen.add(key)
        images = _count(row, "images", f"{where}.")
        by_tag[tag].append((check_integer(f"{where}.correct", _field(row, "correct", f"{where}."), 0, images), images))
    for tag, counts in by_tag.items():
        task, what = tasks[tag], "the counts of its prompts"
        images = sum(n for _, n in counts)
        _agree(f"tasks.{tag}.n_prompts", task["n_prompts"], len(counts), what)
        _agree(f"tasks.{tag}.n_images", task["n_images"], images, what)
        _agree(f"tasks.{tag}.score", task["score"], sum(k for k, _ in counts) / images, what)
        error = clustered_error(*zip(*counts, strict=True))
        if (task["stderr"] is None) != (error is None):
            raise FastgenError(f"tasks.{tag}.stderr: needs a number just where there are two prompts or more")
        if error is not None:
            _agree(f"tasks.{tag}.stderr", task["stderr"], error, what)
    whole = [count for counts in by_tag.values() for count in counts]
    _agree("correct_prompts", data["correct_prompts"], _mean(k > 0 for k, _ in whole), "the counts of the prompts")


# --- distances -----------------------------------------------------------------------------------------------------


def _check_metric(name: str, metric: dict[str, Any], where: str) -> None:
    low = -_MAX_VALUE if name.startswith(_ANY_SIGN) else 0.0
    high = 1.0 if name.startswith(_SHARES) else _MAX_VALUE
    check_number(f"{where}value", _field(metric, "value", where), low, high)
    check_choice(f"{where}better", _field(metric, "better", where), ("higher", "lower"))
    if metric.get("stderr") is not None:
        check_number(f"{where}stderr", metric["stderr"], 0, _MAX_VALUE)
    interval = metric.get("ci95")
    if interval is not None:
        if not isinstance(interval, list) or len(interval) != 2:
            raise FastgenError(f"{where}ci95: needs two numbers, got {interval!r}"[:200])
        ends = [check_number(f"{where}ci95[{i}]", end, low, _MAX_VALUE) for i, end in enumerate(interval)]
        if ends[0] > ends[1]:
            raise FastgenError(f"{where}ci95: its lower end {ends[0]} is above its upper end {ends[1]}")
    if "n_images" in metric:
        check_integer(f"{where}n_images", metric["n_images"], 1, _MAX_COUNT)


# --- fields --------------------------------------------------------------------------------------------------------


def _field(data: dict[str, Any], name: str, where: str) -> Any:
    if name not in data:
        raise FastgenError(f"{where}{name}: is missing")
    return data[name]


def _container(data: dict[str, Any], name: str, where: str, kind: type[_Kind]) -> _Kind:
    value = _field(data, name, where)
    if not isinstance(value, kind):
        needed = "an object" if kind is dict else "a list"
        raise FastgenError(f"{where}{name}: needs {needed}, got {type(value).__name__}")
    return value


def _object(data: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    return _container(data, name, where, dict)


def _text(data: dict[str, Any], name: str, where: str, *, required: bool = False) -> str:
    value = _field(data, name, where) if required else data.get(name)
    if value is None and not required:
        return ""
    if not isinstance(value, str) or (required and not value.strip()):
        raise FastgenError(f"{where}{name}: needs a text, got {value!r}"[:200])
    return value


def _share(data: dict[str, Any], name: str, where: str) -> float:
    return check_number(where + name, _field(data, name, where), 0, 1)


def _count(data: dict[str, Any], name: str, where: str) -> int:
    return check_integer(where + name, _field(data, name, where), 1, _MAX_COUNT)


def _error(data: dict[str, Any], name: str, where: str) -> None:
    if _field(data, name, where) is not None:
        check_number(where + name, data[name], 0, 1)


def _agree(name: str, value: float, other: float, what: str) -> None:
    if not abs(value - other) <= _CLOSE:
        raise FastgenError(f"{name}: {value} contradicts {what}, {other:.10g}")


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
