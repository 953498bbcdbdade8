"""The numbers in a result file of fastgen of any kind, with names, errors and the better direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.checks import check_number
from fastgen.errors import FastgenError
from fastgen.evaluation.result_schema import check_result
from fastgen.io import read_object

OVERALL = "overall"
_SCORES = "scores.json"


@dataclass(frozen=True, slots=True)
class Measure:
    """One number.

    Attributes:
        name: of a task, OVERALL, or the label of a metric with its protocol.
        value: the number.
        stderr: its standard error, None when not known.
        interval: (low, high) of a 95 % confidence interval that the result states itself.
        higher: whether more is better.
        share: whether it is a share of 1, printed in percent.
    """

    name: str
    value: float
    stderr: float | None = None
    interval: tuple[float, float] | None = None
    higher: bool = True
    share: bool = True

    def text(self, digits: int = 1) -> str:
        """For tables: percent with standard error, or the plain number."""
        scale, places = (100.0, digits) if self.share else (1.0, 3)
        error = "" if self.stderr is None else f" ± {scale * self.stderr:.{places}f}"
        return f"{scale * self.value:.{places}f}{error}"


@dataclass(frozen=True, slots=True)
class Point:
    """Quality at a cost: one row of a benchmark, or a whole result."""

    series: str
    name: str
    seconds: float
    score: float
    stderr: float | None


@dataclass(frozen=True, slots=True)
class Result:
    """A result file.

    Attributes:
        path, name: of the file; names distinguish results.
        data: its JSON.
        benchmark: its name.
        measures: the numbers, the most important first.
        points: quality against seconds a picture.
    """

    path: Path
    name: str
    data: dict[str, Any]
    benchmark: str
    measures: tuple[Measure, ...]
    points: tuple[Point, ...]

    @property
    def detector(self) -> str:
        """detector=NAME of what judged the images, "" where nothing did."""
        name = self.data.get("detector_name") or ("shapes" if "tasks" in self.data else "")
        return f"detector={name}" if name else ""

    @property
    def seconds(self) -> float | None:
        """Seconds a picture took, when the result says so."""
        found = self.data.get("seconds_per_image")
        return None if found is None else float(found)

    def measure(self, name: str) -> Measure | None:
        """The number called `name`."""
        return next((measure for measure in self.measures if measure.name == name), None)


def read_result(path: str | Path, name: str | None = None) -> Result:
    """The result in a JSON file.

    Raises:
        FastgenError: it cannot be read, or has no result of an evaluation or a benchmark; the message names it.
    """
    path = Path(path)
    data = read_object(path)
    if "benchmark" not in data:
        raise FastgenError(f"{path}: is no result of `fastgen eval` or `fastgen bench` (it names no benchmark)")
    try:
        check_result(data)
        measures = tuple(_measures(data))
        points = tuple(_points(data, name or _name(path)))
    except FastgenError as error:
        raise FastgenError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FastgenError(f"{path}: is damaged: {type(error).__name__} at {error}") from error
    return Result(path, name or _name(path), data, data["benchmark"], measures, points)


def read_results(paths: Sequence[str | Path]) -> list[Result]:
    """Several results; those with equal names get their folders in front.

    Raises:
        FastgenError: see `read_result`.
    """
    files = [Path(path) for path in paths]
    short = [_name(path) for path in files]
    whole = [(path.parent if path.name == _SCORES else path.with_suffix("")).as_posix() for path in files]
    names = [long if short.count(name) > 1 else name for name, long in zip(short, whole, strict=True)]
    return [read_result(path, name) for path, name in zip(files, names, strict=True)]


def _name(path: Path) -> str:
    """Results of runs are all called scores.json, in folders of different names."""
    return path.resolve().parent.name if path.name == _SCORES else path.stem


def _measures(data: dict[str, Any]) -> list[Measure]:
    found = []
    if "tasks" in data and "overall" in data:
        found.append(Measure(OVERALL, float(data["overall"]), data["overall_stderr"]))
        found += [Measure(tag, float(task["score"]), task["stderr"]) for tag, task in data["tasks"].items()]
    distance = data.get("fd_shapes")
    if distance and distance["value"] is not None:
        interval = distance.get("ci95")
        found.append(_metric(distance["protocol"], {**distance, "ci95": interval, "better": "lower"}))
    if isinstance(data.get("metrics"), dict):
        found += [_metric(metric["label"], metric) for metric in data["metrics"].values()]
    return found


def _metric(label: str, metric: dict[str, Any]) -> Measure:
    interval = metric.get("ci95")
    return Measure(
        label,
        float(metric["value"]),
        metric.get("stderr"),
        None if interval is None else (float(interval[0]), float(interval[1])),
        metric.get("better") == "higher",
        share=False,
    )


def _points(data: dict[str, Any], name: str) -> list[Point]:
    if "overall" in data and data.get("seconds_per_image") is not None:
        return [Point(name, name, float(data["seconds_per_image"]), data["overall"], data["overall_stderr"])]
    points = []
    for number, row in enumerate(data.get("rows", [])):
        seconds = row.get("seconds") if isinstance(row, dict) else None
        if seconds is None or row.get("score") is None:
            continue
        where = f"rows[{number}]"
        if "policy" in row:
            points.append(_search_point(row, where))
        elif isinstance(seconds, dict):
            label = str(row.get("variant", row.get("name", "")))
            # A method with its settings turned up and down is one series.
            series = row.get("rule") or " ".join(word for word in label.split() if not any(map(str.isdigit, word)))
            error = row.get("stderr")
            points.append(
                Point(
                    str(series or label),
                    label,
                    check_number(f"{where}.seconds.p50", seconds["p50"], 0, 1e9),
                    check_number(f"{where}.score", row["score"], 0, 1),
                    None if error is None else check_number(f"{where}.stderr", error, 0, 1),
                )
            )
    return points


def policy_family(policy: str) -> str:
    """A policy of `fastgen bench search` without its budget: names that differ only in that are one policy."""
    return " ".join(word for word in policy.split() if not word.startswith("max_nfe="))


def _search_point(row: dict[str, Any], where: str) -> Point:
    """A policy of a noise search at one budget; budgets of a policy are one series."""
    policy, budget = str(row["policy"]), row.get("budget")
    name = policy if budget is None else f"{policy}, {budget} passes"
    low, high = (check_number(f"{where}.score_ci", end, -1, 2) for end in row["score_ci"])
    stderr = check_number(f"{where}.score_ci", (high - low) / (2 * 1.96), 0)
    seconds = check_number(f"{where}.seconds", row["seconds"], 0, 1e9)
    return Point(policy_family(policy), name, seconds, check_number(f"{where}.score", row["score"], 0, 1), stderr)
