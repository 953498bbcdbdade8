"""What plans of `fastgen.accelerate` give and cost: seconds a picture and score, in turns with the stock pipeline.

Round i draws picture i with the stock pipeline and under every plan, in an order that turns with i, so that a machine
that slows down meets all of them. Fewer steps alone are among the plans: a lossy plan is compared with the seconds
that they take at its score.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.measure import percentiles, result_of, seconds_of
from fastgen.evaluation.report import markdown_table, provenance
from fastgen.evaluation.tune_metrics import Metric
from fastgen.evaluation.tuning import Trial, largest_difference, resume_log, timed_picture
from fastgen.pipelines.accelerate import accelerate, accelerated, restore
from fastgen.pipelines.accelerate.parts import Part

__all__ = ["accelerate_markdown", "benchmark_accelerate", "seconds_of_fewer_steps"]

_RESAMPLES = 1000
_Floats = npt.NDArray[np.float64]


def benchmark_accelerate(
    pipe: Any,
    plans: Sequence[tuple[Part, ...]],
    prompts: Sequence[str],
    metric: Metric,
    call: dict[str, Any],
    log: Path,
    header: dict[str, Any],
    deadline: float = math.inf,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure plans.

    Args:
        pipe: without `accelerate`.
        plans: parts of each; the empty one, the stock pipeline, is always measured.
        prompts: round i draws prompt i with seed i.
        metric: scores the pictures.
        call: arguments of `generate_images`.
        log: file of finished rounds; a killed benchmark resumes from it.
        header: what the numbers depend on; another one begins a new log.
        deadline: `time.monotonic` after which no round starts.
        report: is called with a line for every tenth round.

    Returns:
        a JSON-ready dict: "environment", "settings", "accelerate_seconds" and "rows".

    Raises:
        FastgenError: fewer than 3 rounds were finished in time.
    """
    every: list[tuple[Part, ...]] = list(dict.fromkeys([(), *plans]))
    header = {**header, "plans": [[[part.name, part.settings] for part in plan] for plan in every]}
    rounds = resume_log(log, header)
    firsts = {plan: _first_seconds(pipe, plan, prompts[0], call) for plan in every}  # warm-up
    for i in range(len(rounds), len(prompts)):
        if time.monotonic() > deadline:
            break
        rounds.append(_round(pipe, every, prompts[i], i, metric, call))
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounds[-1]) + "\n")
        if len(rounds) % 10 == 0:
            report(f"{len(rounds)} of {len(prompts)} rounds")
    if len(rounds) < 3:
        raise FastgenError(f"only {len(rounds)} rounds were finished in time, needs at least 3")
    trials = [_trial(rounds, k, plan, firsts[plan]) for k, plan in enumerate(every)]
    return result_of(
        "accelerate",
        {**header, "call": call, "rounds": len(rounds)},
        accelerate_seconds=percentiles([_turn_on(pipe) for _ in range(20)]),
        rows=[_row(trial, trials) for trial in trials],
    )


def _first_seconds(pipe: Any, plan: tuple[Part, ...], prompt: str, call: dict[str, Any]) -> float:
    with accelerated(pipe, plan=plan):
        return timed_picture(pipe, prompt, 0, call)[1]


def _round(
    pipe: Any, plans: Sequence[tuple[Part, ...]], prompt: str, index: int, metric: Metric, call: dict[str, Any]
) -> dict[str, Any]:
    """Seconds, scores and largest differences of one picture under every plan."""
    drawn: dict[int, Any] = {}
    for turn in range(len(plans)):
        k = (turn + index) % len(plans)
        with accelerated(pipe, plan=plans[k]):
            drawn[k] = timed_picture(pipe, prompt, index, call)
    images = [drawn[k][0] for k in range(len(plans))]
    return {
        "seconds": [drawn[k][1] for k in range(len(plans))],
        "scores": metric(images, [prompt] * len(plans), [images[0]] * len(plans)),
        "differences": [largest_difference(image, images[0]) for image in images],
    }


def _trial(rounds: Sequence[dict[str, Any]], k: int, plan: tuple[Part, ...], first: float) -> Trial:
    def column(name: str, number: int) -> tuple[float, ...]:
        return tuple(each[name][number] for each in rounds)

    difference = max(each["differences"][k] for each in rounds)
    values = (column("seconds", k), column("seconds", 0), column("scores", k), column("scores", 0))
    return Trial(plan, *values, difference, first)


def _turn_on(pipe: Any) -> float:
    seconds = seconds_of(partial(accelerate, pipe))
    restore(pipe)
    return seconds


def _row(trial: Trial, trials: Sequence[Trial]) -> dict[str, Any]:
    return {
        "plan": trial.name,
        "parts": [[part.name, part.settings] for part in trial.parts],
        "loss": trial.loss,
        "seconds": percentiles(trial.seconds),
        "ratio": trial.ratio,
        "score": trial.score,
        "drop": trial.drop,
        "largest_difference": trial.largest_difference,
        "first_seconds": trial.first_seconds,
        "time_saved": None if trial.rival else _time_saved(trial, [each for each in trials if each.rival]),
    }


def _time_saved(trial: Trial, rivals: Sequence[Trial]) -> dict[str, Any]:
    """Share of the seconds that fewer steps take at the plan's score, and its 95 % interval by resampled rounds."""

    def saved(chosen: npt.NDArray[np.int64]) -> float | None:
        points = [_point(each, chosen) for each in rivals]
        ratio, score = _point(trial, chosen)
        needed = seconds_of_fewer_steps(points, score)
        return None if needed is None else 1 - ratio / needed

    n = len(trial.seconds)
    source = np.random.default_rng(0)
    samples = [saved(source.integers(0, n, n)) for _ in range(_RESAMPLES)]
    values = [each for each in samples if each is not None]
    enough = len(values) > 0.95 * _RESAMPLES
    interval = [float(each) for each in np.percentile(values, (2.5, 97.5))] if enough else None
    return {"share": saved(np.arange(n)), "interval": interval}


def _point(trial: Trial, chosen: npt.NDArray[np.int64]) -> tuple[float, float]:
    seconds, stock = (np.asarray(each)[chosen] for each in (trial.seconds, trial.stock_seconds))
    return math.exp(float(np.log(seconds / stock).mean())), float(np.asarray(trial.scores)[chosen].mean())


def seconds_of_fewer_steps(points: Sequence[tuple[float, float]], score: float) -> float | None:
    """Seconds that a score takes by the line through the best points, those that no other beats in both.

    Args:
        points: seconds and score of the stock pipeline and of fewer steps.
        score: asked for.

    Returns:
        None where the points do not reach from below the score to above it.
    """
    best: list[tuple[float, float]] = []
    for seconds, each in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or each > best[-1][1]:
            best.append((seconds, each))
    times, scores = zip(*best, strict=True)
    return float(np.interp(score, scores, times)) if scores[0] <= score <= scores[-1] else None


def accelerate_markdown(data: dict[str, Any]) -> str:
    """A result of `fastgen bench accelerate`."""
    rows = []
    for row in data["rows"]:
        ratio, (drop, half) = row["ratio"], row["drop"]
        times = f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})"
        rows.append(
            [row["plan"], row["loss"], f"{row['seconds']['p50']:.3f}", times, f"{row['score']:.3f}"]
            + [f"{drop:.3f} ± {half:.3f}", _saved_text(row["time_saved"])]
        )
    header = [
        "plan",
        "contract",
        "s/picture p50",
        "stock = 1 (95 %)",
        "score",
        "drop",
        "time saved against fewer steps",
    ]
    line = f"`accelerate` itself: {data['accelerate_seconds']['p50'] * 1000:.1f} ms"
    return markdown_table(header, rows) + "\n" + line + "\n\n" + provenance(data) + "\n"


def _saved_text(saved: dict[str, Any] | None) -> str:
    if saved is None or saved["share"] is None:
        return ""
    interval = saved["interval"]
    return f"{saved['share']:.0%}" + ("" if interval is None else f" ({interval[0]:.0%} to {interval[1]:.0%})")
