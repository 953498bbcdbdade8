"""Gates and reports refuse results with values that are not numbers, or that contradict themselves."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastgen.cli.main import run
from fastgen.errors import FastgenError
from fastgen.evaluation.geneval.metadata import Metadata
from fastgen.evaluation.geneval.rules import ImageResult, summarize
from fastgen.evaluation.geneval.verdict_files import prompt_table
from fastgen.evaluation.measures import read_result
from fastgen.evaluation.result_schema import check_result
from fastgen.evaluation.shapesworld import shapes_prompts

COMMITTED = Path(__file__).parents[2] / "docs/results"
Change = Callable[[dict[str, Any]], None]


def scores(worse: int = 0) -> dict[str, Any]:
    """Three prompts of each task with four images; `worse` images of each prompt are wrong besides one in three."""
    results: list[ImageResult] = []
    prompts: list[Metadata] = []
    for number, prompt in enumerate(shapes_prompts(3)):
        for image in range(4):
            results.append(ImageResult(prompt.tag, number, image >= worse + (number % 3 == 0)))
            prompts.append(prompt)
    base = {"benchmark": "ShapesWorld-GenEval", "detector_name": "shapes", "seconds_per_image": 0.5}
    distance = {"value": 0.3, "protocol": "FD-shapes[x]", "n_images": 72}
    table = prompt_table(prompts, results)
    return {**base, **summarize(results).as_dict(), "prompts": table, "fd_shapes": distance}


def distances(value: float = 3.0) -> dict[str, Any]:
    metric = {"label": "fid[adm]", "better": "lower", "value": value, "stderr": 0.1, "ci95": [value - 1, value + 1]}
    recall = {"label": "recall[adm]", "better": "higher", "value": 0.5}
    return {"benchmark": "FID family", "n_images": 50, "metrics": {"fid": metric, "recall": recall}}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all numbers of a result; of a list of prompts, only those of one row."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        last = len(value) if path[-1] == "ci95" else 1
        for number, inner in enumerate(value[:last]):
            yield from places(inner, (*path, number))
    elif isinstance(value, (int, float)) and path[-1] != "id":
        yield path


def named(path: tuple[Any, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def changed(data: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    data = copy.deepcopy(data)
    place: Any = data
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return data


CASES = [(kind, path) for kind in (scores, distances) for path in places(kind())]
WRONG = (math.nan, math.inf, -math.inf, -5, -0.25, 1e300, 10**90, "0.9", "NaN", True, [], {}, [0.5])


@pytest.mark.parametrize(
    ("kind", "path"), CASES, ids=lambda value: value.__name__ if callable(value) else named(value)
)
def test_no_number_may_be_something_else(kind: Callable[[], dict[str, Any]], path: tuple[Any, ...]) -> None:
    """Every number of a result, replaced by everything that it must not be, is named in the error."""
    check_result(kind())
    for value in WRONG:
        with pytest.raises(FastgenError) as error:
            check_result(changed(kind(), path, value))
        text = str(error.value)
        assert text.startswith(named(path)) and "\n" not in text and len(text) < 400, (value, text)


def _no_images(data: dict[str, Any]) -> None:
    data["n_images"] = 0


def _above(data: dict[str, Any]) -> None:
    data["prompts"][0]["correct"] = 5


def _twice(data: dict[str, Any]) -> None:
    data["prompts"].append(dict(data["prompts"][0]))


def _missing(data: dict[str, Any]) -> None:
    del data["tasks"]["counting"]["score"]


def _no_tasks(data: dict[str, Any]) -> None:
    del data["tasks"]


def _empty_tasks(data: dict[str, Any]) -> None:
    data["tasks"] = {}


def _other_mean(data: dict[str, Any]) -> None:
    data["overall"] -= 0.01


def _flattered(data: dict[str, Any]) -> None:
    for task in data["tasks"].values():
        task["score"] = 1.0
    data["overall"] = data["correct_images"] = 1.0


def _wide_error(data: dict[str, Any]) -> None:
    data["tasks"]["colors"]["stderr"] = 0.9


def _unknown_tag(data: dict[str, Any]) -> None:
    data["prompts"][3]["tag"] = "beauty"


def _no_list(data: dict[str, Any]) -> None:
    data["prompts"] = {"a": 1}


def _no_time(data: dict[str, Any]) -> None:
    data["seconds_per_image"] = 1e-320


CONTRADICTIONS: list[tuple[Change, str]] = [
    (_no_images, "n_images: 0"),
    (_no_time, "seconds_per_image: 1e-320"),
    (_above, "prompts[0].correct: 5"),
    (_twice, "prompts[18].prompt"),
    (_missing, "tasks.counting.score: is missing"),
    (_no_tasks, "tasks: is missing"),
    (_empty_tasks, "tasks: is empty"),
    (_other_mean, "overall: "),
    (_flattered, "tasks.single_object.score: 1.0 contradicts"),
    (_wide_error, "overall_stderr: "),
    (_unknown_tag, "prompts[3].tag: 'beauty'"),
    (_no_list, "prompts: needs a list"),
]


@pytest.mark.parametrize(("change", "message"), CONTRADICTIONS)
@pytest.mark.parametrize("command", ["compare", "report"])
def test_what_contradicts_itself_is_named_by_both_commands(
    tmp_path: Path, change: Change, message: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = scores(), scores()
    change(bad)
    for name, data in (("good", good), ("bad", bad)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    files = [str(tmp_path / f"{name}.json") for name in ("good", "bad")]
    options = {"compare": ["--prove", "--margin", "1"], "report": ["-o", str(tmp_path / "r.md")]}[command]
    assert run(["eval", command, *files, *options]) == 2
    error = capsys.readouterr().err
    assert f"bad.json: {message}" in error and error.count("\n") == 1


def test_negative_controls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The gate passes what is whole, and fails what is worse: it does not refuse everything."""
    for name, data in (("a", scores()), ("worse", scores(2)), ("near", distances(3.0)), ("far", distances(9.0))):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    a, worse, near, far = (str(tmp_path / f"{name}.json") for name in ("a", "worse", "near", "far"))
    for first, second, status in ((a, a, 0), (a, worse, 3), (worse, a, 0), (near, near, 0), (near, far, 3)):
        assert run(["eval", "compare", first, second]) == status, (first, second)
    capsys.readouterr()


def _strip(data: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name not in names}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (changed(distances(), ("metrics",), {"fid": distances()["metrics"]["fid"]}), "has no recall"),
        (changed(distances(), ("metrics", "fid", "stderr"), None), "no number with an error"),
        (changed(distances(), ("metrics",), {}), "no number in common"),
    ],
)
def test_a_gate_that_could_decide_nothing_does_not_pass(
    tmp_path: Path, second: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(distances()))
    (tmp_path / "b.json").write_text(json.dumps(second))
    assert run(["eval", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert message in capsys.readouterr().err


def test_fewer_tasks_do_not_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fewer = summarize([ImageResult("colors", number, number > 2) for number in range(8)]).as_dict()
    whole = _strip(scores(), "prompts", "fd_shapes")
    (tmp_path / "a.json").write_text(json.dumps(whole))
    (tmp_path / "b.json").write_text(json.dumps({**whole, **fewer}))
    assert run(["eval", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "other tasks" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.json")), ids=lambda path: path.stem)
def test_the_committed_results_hold(path: Path) -> None:
    if "benchmark" in json.loads(path.read_text()):
        read_result(path)
