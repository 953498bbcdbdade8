"""Which parts of `accelerate` pay for a model on this machine, by measuring: what `fastgen tune` does.

Every plan is timed against the stock pipeline picture by picture, one after the other and with the same seeds, so that
a slow moment of the machine affects both. Parts are chosen greedily with backtracking: the fastest plan whose score is
not too low is taken, every other setting is tried on top of it, and then without each of its parts. Plans with only
fewer steps are always measured: a lossy plan that scores no higher than they do in the same time is useless.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastgen.contracts import Loss, weakest
from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.measure import seconds_of
from fastgen.evaluation.tune_metrics import Metric
from fastgen.io import parse_json
from fastgen.pipelines.accelerate.parts import (
    PARTS,
    Attention,
    BFloat16,
    ChannelsLast,
    Compile,
    DBCache,
    FewerSteps,
    Guidance,
    Kernels,
    Part,
    PromptPadding,
    Quantize,
    QuantizedAttention,
    Solver,
    StepCache,
    TailDrops,
    made_part,
)
from fastgen.pipelines.accelerate.switch import accelerated
from fastgen.pipelines.generation import GeneratedImage, generate_images

__all__ = [
    "SHARES",
    "SHIFTS",
    "Trial",
    "Tuner",
    "beats_fewer_steps",
    "candidates",
    "front",
    "largest_difference",
    "resume_log",
    "timed_picture",
]

SHARES = (0.85, 0.7, 0.55, 0.4, 0.3)
"""Shares of the steps that are tried as fewer steps."""

_CLEARLY_FEWER = 0.7

SHIFTS = (1.0, 2.0, 3.0)
"""What a solver multiplies the shift of the noise levels by."""


def candidates(pipe: Any, loss: Loss, compile: bool = False) -> list[Part]:
    """Parts and settings to try on a pipeline: those that can be used with it and are allowed."""
    parts: list[Part] = [Kernels(), ChannelsLast(), PromptPadding(), Attention(), *([Compile()] if compile else [])]
    if loss == "lossy":
        parts += [FewerSteps(share) for share in SHARES]
        parts += [BFloat16(), *map(Solver, SHIFTS), *(Guidance(share) for share in (0.75, 0.5, 0.25))]
        parts += [StepCache("first-block", threshold) for threshold in (0.05, 0.1, 0.2)]
        parts += [StepCache("taylor-seer", interval=interval) for interval in (2, 3)]
        parts += [DBCache(), QuantizedAttention(), Quantize()]
        parts += [TailDrops(0.0, 0.5), TailDrops(0.25, 0.5), TailDrops(0.5, 0.75)]
    return [part for part in parts if part.why_not(pipe) is None]


@dataclass(frozen=True)
class Trial:
    """A plan that was measured.

    Args:
        parts: that were on.
        seconds, stock_seconds: of each picture and of the stock one that was drawn just before.
        scores, stock_scores: of each picture.
        largest_difference: of a pixel's channel, 0 to 255, over all pictures.
        first_seconds: of the first picture, compilation included.
        peak_bytes: of GPU memory, where there is one.
    """

    parts: tuple[Part, ...]
    seconds: tuple[float, ...]
    stock_seconds: tuple[float, ...]
    scores: tuple[float, ...]
    stock_scores: tuple[float, ...]
    largest_difference: int
    first_seconds: float
    peak_bytes: int | None = None

    @property
    def name(self) -> str:
        return " + ".join(_short(part) for part in self.parts) or "stock"

    @property
    def ratio(self) -> tuple[float, float, float]:
        """Seconds over stock seconds: geometric mean, and the ends of its 95 % interval; 1 for the stock pipeline."""
        if not self.parts:
            return 1.0, 1.0, 1.0
        logs = np.log(np.divide(self.seconds, self.stock_seconds))
        middle, half = float(logs.mean()), _half_width(logs)
        return math.exp(middle), math.exp(middle - half), math.exp(middle + half)

    @property
    def drop(self) -> tuple[float, float]:
        """How much lower the score is than the stock one: paired mean, and half its 95 % interval."""
        if not self.parts:
            return 0.0, 0.0
        lost = np.subtract(self.stock_scores, self.scores)
        return float(lost.mean()), _half_width(lost)

    @property
    def score(self) -> float:
        return float(np.mean(self.scores))

    @property
    def loss(self) -> Loss:
        return weakest(part.loss for part in self.parts)

    @property
    def rival(self) -> bool:
        """Whether fewer steps are all that is lossy in it, or nothing: what every other lossy plan has to beat."""
        return all(part.loss == "exact" or part.name == "fewer_steps" for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "parts"}
        return {"parts": _key(self.parts), **own}

    @classmethod
    def of_dict(cls, data: dict[str, Any]) -> Trial:
        values: dict[str, Any] = dict(data)
        values |= {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
        values["parts"] = tuple(made_part(part, settings) for part, settings in data["parts"])
        return cls(**values)


def _half_width(values: np.ndarray) -> float:
    from scipy import stats

    n = len(values)
    if n < 2:
        return math.inf
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))


def _short(part: Part) -> str:
    shown = {"kind", "threshold"} if getattr(part, "kind", "") == "first-block" else {"kind", "interval"}
    settings = [str(v) for k, v in part.settings.items() if part.name != "step_cache" or k in shown]
    return f"{part.name}({', '.join(settings)})" if settings else part.name


def _key(parts: Iterable[Part]) -> list[list[Any]]:
    return [[part.name, part.settings] for part in parts]


def _combinations(parts: Sequence[Part]) -> list[tuple[Part, ...]]:
    """Additions to a plan to try: each part; a solver together with fewer steps, without which it saves no time."""
    steps = [part for part in parts if isinstance(part, FewerSteps)]
    others = [(part,) for part in parts if part.name not in ("solver", "fewer_steps")]
    fewer = [part for part in steps if part.share <= _CLEARLY_FEWER]
    solved = [(solver, part) for part in fewer for solver in parts if solver.name == "solver"]
    return [*((part,) for part in steps), *others[:1], *solved, *others[1:]]


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Those that no other one beats in both seconds and score, from the fastest."""
    ordered = sorted(trials, key=lambda trial: (trial.ratio[0], -trial.score))
    best, kept = -math.inf, []
    for trial in ordered:
        if trial.score > best:
            kept.append(trial)
            best = trial.score
    return kept


@dataclass
class Tuner:
    """Measures plans for a pipeline.

    Args:
        pipe: loaded, without `accelerate`.
        prompts: texts to draw; each with one seed.
        metric: scores the pictures.
        call: arguments of `generate_images`.
        log: file of finished trials; those in it are not measured again.
        header: what the numbers in the log depend on; another one begins a new log.
        deadline: `time.monotonic` after which no new trial starts.
        report: is called with every trial.
    """

    pipe: Any
    prompts: list[str]
    metric: Metric
    call: dict[str, Any]
    log: Path
    header: dict[str, Any]
    deadline: float = math.inf
    report: Callable[[Trial], None] = lambda trial: None
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stock: list[Image.Image] = []
        self.trials = [Trial.of_dict(data) for data in resume_log(self.log, self.header)]

    @property
    def time_is_up(self) -> bool:
        return time.monotonic() > self.deadline

    def tune(self, parts: Sequence[Part], max_drop: float) -> Trial:
        """Measure, and choose the fastest plan whose mean score drops by no more than `max_drop`: by the upper end of
        the 95 % interval of the drop, so that few pictures which differ much choose nothing.

        Args:
            parts: to choose from.
            max_drop: of the mean score.
        """
        begin = time.monotonic()
        half_time = begin + (self.deadline - begin) / 2
        exact = [part for part in parts if part.loss == "exact"]
        chosen = self.measure(())
        for part in exact:
            alone = self._try((part,))
            if alone is not None and alone.ratio[2] < 1:
                chosen = self._try((*chosen.parts, part)) or chosen
        lossy = _combinations([part for part in parts if part.loss != "exact"])
        for added in lossy:  # fewer steps first: the rival of all others
            if added[0].name != "fewer_steps" and time.monotonic() > half_time:
                break  # the rest is for combinations
            self._try((*chosen.parts, *added))
        chosen = self._best(max_drop, chosen)
        while not self.time_is_up:
            before = chosen
            used = {part.name for part in chosen.parts}
            for added in sorted(lossy, key=lambda added: any(part.name in used for part in added)):  # new ones first
                names = {part.name for part in added}
                self._try((*(each for each in chosen.parts if each.name not in names), *added))
            for part in chosen.parts:  # the look back
                self._try(tuple(each for each in chosen.parts if each is not part))
            chosen = self._best(max_drop, chosen)
            if chosen is before:
                break
        return chosen

    def _best(self, max_drop: float, default: Trial) -> Trial:
        good = [trial for trial in self.trials if sum(trial.drop) <= max_drop and trial.ratio[2] < 1]
        return min(good, key=lambda trial: trial.ratio[0], default=default)

    def _known(self, parts: tuple[Part, ...]) -> Trial | None:
        return next((trial for trial in self.trials if set(trial.parts) == set(parts)), None)

    def _try(self, parts: tuple[Part, ...]) -> Trial | None:
        """`measure`, or None where it is not known and time is up."""
        return self._known(parts) if self.time_is_up else self.measure(parts)

    def measure(self, parts: tuple[Part, ...]) -> Trial:
        """Draw every prompt without and with the parts, one after the other; known pairs are not measured again."""
        if (known := self._known(parts)) is not None:
            return known
        parts = tuple(sorted(parts, key=lambda part: list(PARTS).index(part.name)))
        if not self.stock:  # the first pictures also warm up
            self.stock = [self._draw(i)[0] for i in range(len(self.prompts))]
        with accelerated(self.pipe, plan=parts):
            first = self._draw(0)[1]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        times, stock_times, images = [], [], []
        for i in range(len(self.prompts)):
            image, seconds = self._draw(i)
            stock_times.append(seconds)
            if parts:
                with accelerated(self.pipe, plan=parts):
                    image, seconds = self._draw(i)
            images.append(image)
            times.append(seconds)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        scores = self.metric(images, self.prompts, self.stock)
        stock_scores = self.metric(self.stock, self.prompts, self.stock)
        difference = max(largest_difference(a, b) for a, b in zip(images, self.stock, strict=True))
        trial = Trial(
            parts, tuple(times), tuple(stock_times), tuple(scores), tuple(stock_scores), difference, first, peak
        )
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(trial.as_dict()) + "\n")
        self.trials.append(trial)
        self.report(trial)
        return trial

    def draw(self, parts: tuple[Part, ...], count: int) -> list[Image.Image]:
        """The first pictures under a plan."""
        with accelerated(self.pipe, plan=parts):
            return [self._draw(i)[0] for i in range(min(count, len(self.prompts)))]

    def _draw(self, index: int) -> tuple[Image.Image, float]:
        return timed_picture(self.pipe, self.prompts[index], index, self.call)


def resume_log(log: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The finished lines of a log of this header, behind which new ones can be written; a log of another header is
    replaced."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    known: list[Any] = []
    with suppress(FastgenError):  # what a kill left of the last line
        known.extend(parse_json(line, log) for line in lines)
    same = bool(known) and known[0] == json.loads(json.dumps(header))
    kept = lines[: len(known)] if same else [json.dumps(header)]
    log.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return known[1 : len(kept)]


def timed_picture(pipe: Any, prompt: str, seed: int, call: dict[str, Any]) -> tuple[Image.Image, float]:
    """A picture and its seconds; `call` as `generate_images` takes it."""
    drawn: list[GeneratedImage] = []
    seconds = seconds_of(lambda: drawn.extend(generate_images(pipe, [prompt], [seed], **call)), pipe._execution_device)
    return drawn[0].image, seconds


def beats_fewer_steps(trial: Trial, trials: Sequence[Trial]) -> bool | None:
    """Whether a lossy plan scores above the stock pipeline with fewer steps in the same time, by the line through
    those that were measured; None where they do not reach that time, or for fewer steps themselves."""
    if trial.rival:
        return None
    rivals = front([each for each in trials if each.rival])
    points = sorted((each.ratio[0], each.score) for each in rivals)
    seconds, scores = zip(*points, strict=True)
    if not seconds[0] <= trial.ratio[0] <= seconds[-1]:
        return None
    return trial.score > float(np.interp(trial.ratio[0], seconds, scores))


def largest_difference(a: Image.Image, b: Image.Image) -> int:
    """Of a pixel's channel, 0 to 255."""
    first, second = (np.asarray(each.convert("RGB"), dtype=np.int16) for each in (a, b))
    return int(np.abs(first - second).max())
