"""Is b worse than a? Differences of two results with confidence intervals, for the CI of models and kernels.

Scores of prompts are compared in pairs where both results contain them: an easy prompt is easy for both, so the
difference has a smaller error than either score. Everything else is compared as independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from fastgen.checks import check_number
from fastgen.errors import FastgenError
from fastgen.evaluation.measures import OVERALL, Measure, Result
from fastgen.evaluation.report import markdown_table, plain

WORSE, BETTER, SAME, UNKNOWN = "worse", "better", "no difference", "no interval"


@dataclass(frozen=True, slots=True)
class Difference:
    """One number of both results.

    Attributes:
        name: of the number.
        a, b: its values.
        stderr: of b - a, None when not known.
        low, high: confidence interval of b - a.
        paired: whether the prompts were compared one by one.
        gated: whether the exit status depends on it.
        verdict: WORSE, BETTER, SAME or UNKNOWN.
        failed: gated and a regression.
    """

    name: str
    a: float
    b: float
    stderr: float | None
    low: float | None
    high: float | None
    paired: bool
    gated: bool
    verdict: str
    failed: bool
    share: bool

    @property
    def difference(self) -> float:
        """b - a."""
        return self.b - self.a


@dataclass(frozen=True, slots=True)
class Comparison:
    """All differences of two results."""

    a: Result
    b: Result
    rows: list[Difference]
    confidence: float
    margin: float
    slowdown: float | None
    too_slow: bool

    @property
    def regressed(self) -> bool:
        """Whether a gate failed."""
        return self.too_slow or any(row.failed for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready dict."""
        return {
            "a": str(self.a.path),
            "b": str(self.b.path),
            "benchmark": self.a.benchmark,
            "detector_name": self.a.detector.removeprefix("detector="),
            "confidence": self.confidence,
            "margin": self.margin,
            "slowdown": self.slowdown,
            "too_slow": self.too_slow,
            "regressed": self.regressed,
            "rows": [{**asdict(row), "difference": row.difference} for row in self.rows],
        }

    def markdown(self) -> str:
        """A table, and the verdict in words."""
        rows = []
        for row in self.rows:
            scale, digits = (100.0, 1) if row.share else (1.0, 3)
            interval = "" if row.low is None or row.high is None else (
                f"{scale * row.low:+.{digits}f} … {scale * row.high:+.{digits}f}"
            )  # fmt: skip
            numbers = (f"{scale * value:.{digits}f}" for value in (row.a, row.b))
            verdict = ("**" + row.verdict + "**" if row.failed else row.verdict) + (" (gate)" if row.gated else "")
            rows.append([plain(row.name), *numbers, f"{scale * row.difference:+.{digits}f}", interval, verdict])
        percent = f"{100 * self.confidence:g} %"
        names = [plain(result.name) for result in (self.a, self.b)]
        table = markdown_table(["measure", *names, "difference", percent, "verdict"], rows)
        paired = " Prompts compared in pairs." if any(row.paired for row in self.rows) else ""
        lines = [f"{plain(f'{self.a.benchmark} {self.a.detector}')}.{paired}\n\n{table}"]
        if self.slowdown is not None:
            lines.append(f"Seconds a picture: {self.slowdown:.3f} times those of {names[0]}.\n")
        failed = [plain(row.name) for row in self.rows if row.failed] + ["seconds a picture"] * self.too_slow
        lines.append(f"REGRESSION: {', '.join(failed)}\n" if failed else "no regression\n")
        return "\n".join(lines)


def compare(
    a: Result,
    b: Result,
    *,
    confidence: float = 0.95,
    margin: float = 0.0,
    gates: Sequence[str] | None = None,
    prove: bool = False,
    max_slowdown: float | None = None,
) -> Comparison:
    """Differences b - a.

    A gated number fails when it is worse than `margin` allows with the whole confidence interval, or, with `prove`,
    unless the whole interval is no worse than `margin` allows. With several gates each interval is widened so that all
    of them are valid together (Bonferroni).

    Args:
        a: the baseline.
        b: the result to judge.
        margin: loss that is allowed: an absolute share for scores, relative to a for distances.
        gates: names of numbers; None takes the overall score, or all metrics with an interval.
        max_slowdown: seconds a picture may grow by this factor.

    Raises:
        FastgenError: the results do not compare: another benchmark, detector, protocol or prompts; a gate that they
            do not both have; or no number with an error, which could decide; or confidence, margin or max_slowdown
            out of range.
    """
    if not 0 < confidence < 1:
        raise FastgenError(f"confidence: {confidence} is not allowed, needs a number between 0 and 1")
    check_number("margin", margin, 0)
    if max_slowdown is not None:
        check_number("max_slowdown", max_slowdown, 1e-9)
    pairs = _common(a, b)
    chosen = _gates(a, b, pairs, gates)
    errors = paired_errors(a.data, b.data)
    level = 1 - (1 - confidence) / max(len(chosen), 1)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rows = []
    for before, after in pairs:
        stderr = errors.get(before.name, _independent(before, after))
        low = high = None
        verdict, failed = UNKNOWN, False
        gated = before.name in chosen
        if stderr is not None:
            gap = after.value - before.value
            low, high = gap - z * stderr, gap + z * stderr
            # In the direction in which more is better.
            worst, best = (low, high) if before.higher else (-high, -low)
            verdict = WORSE if best < 0 else BETTER if worst > 0 else SAME
            allowed = margin if before.share else margin * abs(before.value)
            failed = gated and (worst < -allowed if prove else best < -allowed)
        elif gated:
            raise FastgenError(
                f"{before.name}: has no error in one of the results (a task needs two prompts, a distance its "
                "bootstrap), so nothing can be said of it"
            )
        paired = before.name in errors
        values = (before.value, after.value, stderr, low, high)
        rows.append(Difference(before.name, *values, paired, gated, verdict, failed, before.share))
    slowdown = b.seconds / a.seconds if a.seconds and b.seconds else None
    if max_slowdown is not None and slowdown is None:
        raise FastgenError("--max-slowdown: one of the results does not say how long a picture took")
    too_slow = max_slowdown is not None and slowdown is not None and slowdown > max_slowdown
    return Comparison(a, b, rows, confidence, margin, slowdown, too_slow)


def _common(a: Result, b: Result) -> list[tuple[Measure, Measure]]:
    """The numbers that both have."""
    if a.benchmark != b.benchmark:
        raise FastgenError(f"{a.path} contains {a.benchmark}, {b.path} contains {b.benchmark}: they do not compare")
    for key, what in (("detector_name", "detectors"), ("detector", "weights of the detector")):
        held, other = a.data.get(key) or "", b.data.get(key) or ""
        if held != other:
            names = [name[:20] or "unnamed ones" for name in (held, other)]
            raise FastgenError(f"{a.path} and {b.path} were judged by other {what}: {names[0]} and {names[1]}")
    colors = [result.data.get("judge", {}).get("color_model_sha256") for result in (a, b)]
    if all(colors) and colors[0] != colors[1]:
        raise FastgenError(f"{a.path} and {b.path} had their colours named by other weights")
    if set(a.data.get("tasks", ())) != set(b.data.get("tasks", ())):
        raise FastgenError(f"{a.path} and {b.path} have other tasks: they do not compare")
    tables = [_prompts(result.data) for result in (a, b)]
    if tables[0] and tables[1] and tables[0].keys() != tables[1].keys():
        raise FastgenError(f"{a.path} and {b.path} were made of other prompts: they do not compare")
    pairs = [(measure, other) for measure in a.measures if (other := b.measure(measure.name)) is not None]
    if not pairs:
        labels = [", ".join(measure.name for measure in result.measures) or "nothing" for result in (a, b)]
        raise FastgenError(f"{a.path} and {b.path} have no number in common: {labels[0]}; and {labels[1]}")
    return pairs


def _gates(a: Result, b: Result, pairs: Sequence[tuple[Measure, Measure]], gates: Sequence[str] | None) -> set[str]:
    names = [before.name for before, _ in pairs]
    if gates is None and OVERALL in names:
        return {OVERALL}
    if gates is None or "all" in gates:
        for one, other in ((a, b), (b, a)):
            for measure in one.measures:
                if measure.name not in names:
                    raise FastgenError(f"{other.path} has no {measure.name}; choose with --gate what decides")
        chosen = {before.name for before, after in pairs if _independent(before, after) is not None}
        if not chosen:
            raise FastgenError(
                f"{a.path} and {b.path} have no number with an error in both, so nothing can be said (a task needs "
                "two prompts, a distance its bootstrap)"
            )
        return chosen
    for gate in gates:
        if gate not in names:
            raise FastgenError(f"--gate: {gate!r} is not allowed, needs all or one of {', '.join(names)}")
    return set(gates)


def _independent(a: Measure, b: Measure) -> float | None:
    """Standard error of the difference of two independent numbers."""
    if a.stderr is None or b.stderr is None:
        return None
    return math.hypot(a.stderr, b.stderr)


def _prompts(data: dict[str, Any]) -> dict[tuple[str, str], tuple[int, int]]:
    """(tag, prompt) -> (correct, images); empty when the result does not say."""
    rows = data.get("prompts") or []
    return {(row["tag"], row["prompt"]): (row["correct"], row["images"]) for row in rows}


def paired_errors(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    """Standard error of the difference of each task, and of the mean of tasks, by prompts as pairs.

    With n_p images and k_p correct ones of prompt p, P prompts and s = sum k / sum n, prompt p moves a score by
    (k_p - s n_p) / sum n (the ratio estimator); the difference is moved by the difference of both, so

        stderr^2 = P / (P - 1) * sum_p (move_b(p) - move_a(p))^2.
    """
    first, second = _prompts(a), _prompts(b)
    if not first or not second:
        return {}
    errors = {}
    for tag in a["tasks"]:
        keys = [key for key in first if key[0] == tag]
        if len(keys) < 2:
            return {}
        moves = []
        for table in (first, second):
            hits, sizes = np.array([table[key] for key in keys], dtype=np.float64).T
            moves.append((hits - hits.sum() / sizes.sum() * sizes) / sizes.sum())
        count = len(keys)
        errors[tag] = float(np.sqrt(count / (count - 1) * ((moves[1] - moves[0]) ** 2).sum()))
    overall = math.sqrt(sum(error * error for error in errors.values())) / len(errors)
    return {OVERALL: overall, **errors}
