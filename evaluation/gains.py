"""The README's table of measured gains, from the committed results."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from fastgen.evaluation.report import markdown_table, percent
from fastgen.io import read_object

__all__ = ["gains_table"]

_NEAR = 0.015
_HEADER = ["method", "on", "speed", "quality", "measured by"]


def _rows(data: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    return {row[key]: row for row in data["rows"]}


def _score(row: dict[str, Any]) -> str:
    error = "" if row.get("stderr") is None else f" ± {percent(row['stderr'])}"
    return percent(row["score"]) + error


def _device(data: dict[str, Any]) -> str:
    if data["settings"]["device"] == "cuda":
        return str(data["environment"]["gpus"][0])
    threads = data["environment"]["threads"]
    return f"{threads} CPU thread{'s' if threads != 1 else ''}"


def _speculative(rule: str, data: dict[str, Any]) -> list[str]:
    """The fastest row of a rule, with what it loses against the plain loop where that is not nothing by its law."""
    rows = _rows(data, "variant")
    ours = [row for row in rows.values() if row["rule"] == rule]
    drawn, plain = max(ours, key=lambda row: row["speedup_vs_fastest_plain"]), rows["plain loop, bfloat16"]
    speed = (
        f"{drawn['speedup_vs_fastest_plain']:.1f} x the fastest plain loop, "
        f"{drawn['speedup_vs_stock']:.1f} x stock `generate`"
    )
    if rule == "exact":
        quality = f"same distribution; {_score(drawn)} % correct, plain loop {_score(plain)} %"
    else:
        change, low, high = (100 * value for value in (drawn["paired"]["difference"], *drawn["paired"]["ci"]))
        quality = (
            f"lossy; {_score(drawn)} % correct, {change:+.1f} points against the plain loop "
            f"({low:+.1f} to {high:+.1f}, 95 %, paired by prompt)"
        )
    on = f"`{data['settings']['model']}`, {_device(data)}"
    name = drawn["variant"].replace(" ", "`, `", 1)
    return [f"speculative decoding, `{name}`", on, speed, quality, "`fastgen bench speculative`"]


def _search(data: dict[str, Any]) -> list[str]:
    rows = _rows(data, "policy")
    found, none = rows["threshold"], rows["none"]
    (rival,) = (row for row in data["equal"] if row["policy"] == "threshold" and row["rival"] == "best-of-n")
    speed = f"{found['seconds']:.2f} s a picture, {none['seconds']:.2f} s without a search"
    quality = (
        f"{percent(found['score'])} % correct, {percent(none['score'])} % without; best-of-n in the same time "
        f"{percent(rival['rival_score'])} %"
    )
    on = f"`{data['settings']['model']}`, {_device(data)}"
    return ["noise search, `threshold`", on, speed, quality, "`fastgen bench search`"]


def _chunking(data: dict[str, Any]) -> list[str]:
    """The fastest chunked row within 1.5 points of the dense model, or the one of the best score; against that model,
    and against the best other row of no more seconds."""
    rows = _rows(data, "variant")
    dense, chunked = rows["dense"], [row for name, row in rows.items() if name.startswith("dc ")]
    near = [row for row in chunked if row["score"] >= dense["score"] - 0.015]
    ours = min(near, key=_seconds) if near else max(chunked, key=lambda row: row["score"])
    rivals = [row for row in rows.values() if row not in chunked and _seconds(row) <= _seconds(ours)]
    speed = f"{_seconds(dense) / _seconds(ours):.2f} x the dense model"
    quality = f"{_score(ours)} % correct, the dense model {_score(dense)} %"
    if rivals:
        rival = max(rivals, key=lambda row: row["score"])
        quality += f"; in no more time, {rival['variant']}: {_score(rival)} %"
    on = f"`{data['settings']['model']}`, {_device(data)}"
    return [f"dynamic chunking, `{ours['variant']}`", on, speed, quality, "`fastgen bench dc`"]


def _seconds(row: dict[str, Any]) -> float:
    return float(row["seconds"]["p50"])


def _accelerate(data: dict[str, Any]) -> list[str]:
    """The exact parts, and the fastest plan with a mean score within 1.5 points of the stock pipeline's."""
    rows = _rows(data, "plan")
    stock, exact = rows["stock"], next(row for row in rows.values() if row["parts"] and row["loss"] == "exact")
    near = [row for row in rows.values() if row["loss"] == "lossy" and row["drop"][0] <= _NEAR]
    best = min(near, key=lambda row: row["ratio"][0])
    fewer = min((row for row in rows.values() if _only_fewer_steps(row)), key=lambda row: row["ratio"][0])
    speed = (
        f"{1 / exact['ratio'][0]:.2f} x stock, exact; {1 / best['ratio'][0]:.1f} x by the plan "
        f"(fewer steps alone: {1 / fewer['ratio'][0]:.1f} x)"
    )
    quality = (
        f"{percent(stock['score'])} % correct stock and exact; plan {percent(best['score'])} %, fewer steps "
        f"{percent(fewer['score'])} %, each ± {percent(max(best['drop'][1], fewer['drop'][1]))} against stock (95 %)"
    )
    on = f"`{data['settings']['model']}`, {_device(data)}"
    return ["`accelerate`, and a plan of `tune`'s parts", on, speed, quality, "`fastgen bench accelerate`"]


def _only_fewer_steps(row: dict[str, Any]) -> bool:
    return [name for name, _ in row["parts"]] == ["fewer_steps"]


def _kernels(data: dict[str, Any]) -> list[str]:
    rows = _rows(data, "model")
    (name,) = (name for name in rows if name.startswith("Z-Image"))
    speed = f"{rows[name]['speedup_eager']:.2f} x eager, {rows[name]['speedup_compiled']:.2f} x compiled"
    return [
        "fused kernels",
        f"{name}, {_device(data)}",
        speed,
        "equal up to rounding",
        "`fastgen bench kernels --end-to-end`",
    ]


def gains_table(folder: Path) -> str:
    """Gains and costs of each method with a result in `folder`."""
    methods = (
        ("bench-accelerate", _accelerate),
        ("bench-speculative", partial(_speculative, "exact")),
        ("bench-speculative", partial(_speculative, "cascade")),
        ("bench-search-equal", _search),
        ("bench-dc", _chunking),
        ("bench-kernels-end-to-end", _kernels),
    )
    rows = [row(read_object(path)) for name, row in methods if (path := folder / f"{name}.json").is_file()]
    table = markdown_table(_HEADER, rows)
    return table.replace("---:", "---")  # words, not numbers to compare by their digits
