"""Thresholds that were measured for a model with its verifier: `fastgen train search-calibrate` writes them.

A calibration has several schedules, from sparing to thorough. Each says what a candidate has to score at each time,
and how many evaluations a picture took under it; a search takes the most thorough one that its budget pays for.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.checks import check_number
from fastgen.errors import FastgenError
from fastgen.io import atomic_write_json, read_object
from fastgen.pipelines.search.prospects import Prospects
from fastgen.pipelines.search.thresholds import Scheduled

__all__ = ["FILE", "GOOD", "Calibration", "Schedule", "calibration_for", "model_signature", "read_calibrations"]

FILE = "thresholds.json"
#: The chance of being correct at which a picture is good enough.
GOOD = 0.9
_NETWORKS = ("transformer", "unet")


def model_signature(pipe: Any) -> dict[str, Any]:
    """Identifies a model: the classes of the pipeline and of its network, and the network's
    configuration."""
    name, network = next(((name, getattr(pipe, name)) for name in _NETWORKS if hasattr(pipe, name)), ("", None))
    config = {key: value for key, value in dict(getattr(network, "config", {})).items() if not key.startswith("_")}
    found = {"pipeline": type(pipe).__name__, "part": name, "class": type(network).__name__, "config": config}
    return json.loads(json.dumps(found, sort_keys=True, default=str))  # as it is read from a file


@dataclass(frozen=True)
class Schedule:
    """One schedule of thresholds.

    Attributes:
        price: the gain of one evaluation below which another candidate was not worth trying, in standard deviations
            of what is wanted of the picture (see `Calibration.wanted`).
        taus: at each of the calibration's times.
        evaluations: of a picture, on average, where no transition tries more than `Calibration.branches`.
    """

    price: float
    taus: tuple[float, ...]
    evaluations: float

    def __post_init__(self) -> None:
        for name in ("price", "evaluations"):
            check_number(name, getattr(self, name))


@dataclass(frozen=True)
class Calibration:
    """Thresholds of a verifier for a model.

    Attributes:
        model: as it was named.
        signature: of it, see `model_signature`.
        verifier: name.
        times: N noise levels in the model's own interpolant, falling.
        schedules: from sparing to thorough.
        branches: candidates of a transition that were tried to measure them.
        wanted: "correct": that a checker finds the final picture right; "score": its score.
        fixed: the smallest threshold above which at least 90 % of final pictures are correct; None: there is none, or
            pictures were not judged.
        quantiles: of the scores at each time, by q.
        report: what else was measured.
        about: what it was made with.
        prospects: what became of previews of which scores; None: not judged.

    Raises:
        ValueError: lengths or numbers that do not fit.
    """

    model: str
    signature: Mapping[str, Any]
    verifier: str
    times: tuple[float, ...]
    schedules: tuple[Schedule, ...]
    branches: int
    wanted: str
    fixed: float | None = None
    quantiles: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict, compare=False)
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)
    prospects: Prospects | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.signature, Mapping) or not isinstance(self.signature.get("config", {}), Mapping):
            raise ValueError("signature: needs an object with an object config")
        falling = all(after < before for before, after in zip(self.times, self.times[1:], strict=False))
        if not self.times or not falling:
            raise ValueError(f"times: {list(self.times)} is not allowed, needs numbers that fall")
        if not self.schedules:
            raise ValueError("schedules: needs at least one")
        rows = [*(schedule.taus for schedule in self.schedules), *self.quantiles.values()]
        if any(len(row) != len(self.times) or not all(map(math.isfinite, row)) for row in rows):
            raise ValueError(f"schedules, quantiles: need {len(self.times)} finite numbers each, one for each time")
        if self.prospects is not None and len(self.prospects.scores) != len(self.times):
            raise ValueError(f"prospects: need {len(self.times)} rows, one for each time")

    def fits(self, pipe: Any) -> bool:
        """Whether it was made for this model. Settings that only one side knows (a library gained some) do not
        count."""
        ours, found = dict(self.signature), model_signature(pipe)
        config, theirs = ours.pop("config", {}), found.pop("config")
        return ours == found and all(config[key] == theirs[key] for key in config.keys() & theirs.keys())

    def schedule(self, evaluations: float = math.inf) -> Schedule:
        """The most thorough schedule that takes at most this many evaluations, else the cheapest one.

        Args:
            evaluations: of a picture; infinite: no limit, for which the middle one is taken.
        """
        ordered = sorted(self.schedules, key=lambda schedule: schedule.evaluations)
        if math.isinf(evaluations):
            return ordered[len(ordered) // 2]
        paid = [schedule for schedule in ordered if schedule.evaluations <= evaluations]
        return paid[-1] if paid else ordered[0]

    @property
    def goal(self) -> float | None:
        """The score of a picture that is good enough; None: it is not known which pictures are."""
        return None if self.prospects is None else self.prospects.good(GOOD)

    def prospects_at(self, times: Sequence[float]) -> Prospects | None:
        """The prospects at the times of a search (see `threshold`), each those of the nearest of ours."""
        if self.prospects is None:
            return None
        ours = np.array(self.times)
        return self.prospects.at([int(np.abs(ours - time).argmin()) for time in times])

    def threshold(self, times: Sequence[float], evaluations: float = math.inf) -> Scheduled:
        """The thresholds of a search.

        Args:
            times: of its trajectories, as noise levels in the model's own interpolant; between ours and beyond them
                thresholds are interpolated and held.
            evaluations: that it may take for a picture.
        """
        chosen = self.schedule(evaluations)
        taus = np.interp(times, self.times[::-1], chosen.taus[::-1])
        source = f"{self.model}, price {chosen.price:g}"
        return Scheduled(tuple(float(tau) for tau in taus), len(taus), source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a JSON file."""
        atomic_write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote, from the file or the folder that contains `thresholds.json`.

        Raises:
            FastgenError: the file is missing or broken; the line says what.
        """
        place = Path(path)
        place = place / FILE if place.is_dir() else place
        data = read_object(place)
        try:
            rows = [Schedule(**{**row, "taus": tuple(row["taus"])}) for row in data.pop("schedules")]
            quantiles = {key: tuple(row) for key, row in data.pop("quantiles").items()}
            seen = data.pop("prospects", None)
            if seen is not None:
                curves = {key: tuple(tuple(row) for row in seen[key]) for key in ("scores", "chances")}
                looks = None if seen["looks"] is None else tuple(map(tuple, seen["looks"]))
                seen = Prospects(seen["chance"], **curves, looks=looks)
            fixed = {**data, "times": tuple(data["times"])}
            return cls(**fixed, schedules=tuple(rows), quantiles=quantiles, prospects=seen)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FastgenError(f"thresholds: {place} cannot be read: {type(error).__name__} {error}") from error


def read_calibrations(folder: str | os.PathLike[str]) -> tuple[Calibration, ...]:
    """All calibrations in a folder, none where there is no such folder.

    Raises:
        FastgenError: one is broken.
    """
    return tuple(Calibration.load(path) for path in sorted(Path(folder).glob("*.json")))


def calibration_for(
    pipe: Any, verifier: Any, given: Calibration | str | os.PathLike[str] | None = None
) -> Calibration | None:
    """Measurements for a model with its verifier.

    Args:
        pipe: of the model.
        verifier: may have some in `thresholds`.
        given: to take in place of those, or its file.

    Raises:
        FastgenError: `given` cannot be read, or is of another verifier or model.
    """
    if given is None:
        return next((each for each in getattr(verifier, "thresholds", ()) if each.fits(pipe)), None)
    if not isinstance(given, Calibration | str | os.PathLike):
        raise FastgenError(f"thresholds: {given!r} is not allowed, needs a calibration or its file")
    found = given if isinstance(given, Calibration) else Calibration.load(given)
    name = getattr(verifier, "name", "")
    if name and name != found.verifier:
        raise FastgenError(f"thresholds: were measured with verifier {found.verifier}, not with {name}")
    kind = found.signature.get("pipeline")
    if kind is not None and kind != type(pipe).__name__:
        raise FastgenError(f"thresholds: were measured for a {kind}, and this is a {type(pipe).__name__}")
    if not found.fits(pipe):
        raise FastgenError(f"thresholds: were measured for {found.model}, a model of another configuration")
    return found
