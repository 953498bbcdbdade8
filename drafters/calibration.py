"""One setting for CASCADE-R: quality 0 is exact, 1 the fastest; a calibration defines the levels between.

`fastgen train cascade-calibrate` makes a calibration for a target with its drafter. Each level limits the total
variation between the distributions that follow two tokens of one class: at its thresholds, 90 % of the observed pairs
are below that limit. Without siblings the median sensitivity counts, and more pairs are above it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgen.checks import check_number
from fastgen.drafters.acceptance import AcceptanceRule
from fastgen.drafters.cascade import CascadeConfig
from fastgen.drafters.pace import Pace, machine_of
from fastgen.drafters.redundancy import (
    convergence,
    node_similarity,
    sensitivity,
    sibling_pairs,
    sibling_states,
    total_variation,
)
from fastgen.drafters.verify import Decisions, Drafted, Noise, strict
from fastgen.errors import FastgenError
from fastgen.io import read_object

__all__ = ["Calibration", "Level", "PairRecorder", "calibrate_levels", "sampled_weights"]

FILE = "calibration.json"
#: Quality and the total variation that it allows.
LIMITS = ((0.25, 0.05), (0.5, 0.10), (0.75, 0.15), (1.0, 0.25))
_SHARE = 0.9
_FEWEST_PAIRS = 50
_SAMPLES, _ROUNDING = 8, 0.01  # weights that identify a network, and how far another dtype may move them


class Drop(NamedTuple):
    """A loss of score, with its standard error."""

    score: float
    stderr: float


@dataclass(frozen=True, slots=True)
class Level:
    """Thresholds of one quality level.

    Attributes:
        quality: in (0, 1].
        limit: total variation that 90 % of the related pairs stay below.
        breadth, depth, radius: see `CascadeConfig`; 2 and 0 where no threshold meets the limit.
        pairs: number of related pairs by breadth, depth and radius at these thresholds.
        drops: measured loss of score against the exact rule, by source.

    Raises:
        FastgenError: a value of the wrong type, or out of range.
    """

    quality: float
    limit: float
    breadth: float
    depth: float
    radius: float
    pairs: tuple[int, int, int]
    drops: Mapping[str, Drop] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_number("quality", self.quality, maximum=1, above=0)
        for name in ("limit", "breadth", "depth"):
            check_number(name, getattr(self, name))
        check_number("radius", self.radius, 0)


@dataclass(frozen=True)
class Calibration:
    """Levels of CASCADE-R for one model.

    Attributes:
        levels: sorted by quality.
        sensitivity: median over sibling pairs of their node's, for drafts without siblings (see `CascadeConfig`);
            None: not measured.
        about: the model and the settings of the calibration.
        pace: which sources are fastest, if measured.
    """

    levels: tuple[Level, ...]
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)
    pace: Pace | None = None
    sensitivity: float | None = None

    def __post_init__(self) -> None:
        if self.sensitivity is not None:
            check_number("sensitivity", self.sensitivity, above=0)

    def check(self, sizes: Mapping[str, Any], label: str = "calibration") -> None:
        """Check that it was made for this model, as far as it records that.

        Args:
            sizes: of the model, see `fastgen.drafters.drafter.describe`.
            label: its name in the message.

        Raises:
            FastgenError: names the mismatch.
        """
        made = self.about.get("target")
        for name, value in sizes.items():
            if isinstance(made, Mapping) and made.get(name, value) != value:
                raise FastgenError(f"{label}: made for a model of {name} {made[name]}, this one has {value}")

    def check_weights(self, **networks: Any) -> None:
        """Check that it was made for these weights, as far as it records them and they can be read.

        Args:
            networks: "model" and "drafter", if there is one.

        Raises:
            FastgenError: names the part that has other weights.
        """
        made = self.about.get("weights")
        for part, network in networks.items():
            known = made.get(part) if isinstance(made, Mapping) else None
            known = known if isinstance(known, Mapping) else {}
            now = sampled_weights(network, [name for name, value in known.items() if isinstance(value, float)])
            if any(abs(value - known[name]) > 1e-6 + _ROUNDING * abs(value) for name, value in now.items()):
                raise FastgenError(
                    f"calibration: made for a {part} of other weights; give none, or make one with `fastgen train "
                    "cascade-calibrate`"
                )

    def config(self, quality: float, **settings: Any) -> CascadeConfig:
        """Thresholds of the highest level up to `quality`; below the first level nothing is relaxed.

        Raises:
            ValueError: quality outside [0, 1].
        """
        check_number("quality", quality, 0, 1)
        fitting = [level for level in self.levels if level.quality <= quality]
        if not fitting:
            return CascadeConfig.off()
        level = fitting[-1]
        if self.sensitivity is not None:
            settings = {"sensitivity": self.sensitivity, **settings}
        return CascadeConfig(breadth=level.breadth, depth=level.depth, radius=level.radius, **settings)

    def with_results(self, data: Mapping[str, Any]) -> Calibration:
        """A copy with the pace and the drops of score from a benchmark.

        Args:
            data: a result of `fastgen bench speculative`. A drop compares "cascade SOURCE quality=Q" with "exact
                SOURCE" (without "x2", if a window has several candidates per place).

        Raises:
            FastgenError: another kind of result, or one that measured neither.
        """
        try:
            rows, settings = list(data["rows"]), data["settings"]
            made = Pace.of_rows(rows, machine_of(torch.device(settings["device"]).type, bool(settings["compile"])))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FastgenError(f"--data: not a result of `fastgen bench speculative`: {error!r}") from error
        self.check(settings.get("target", {}), "--data is of another model: calibration")
        if not made.tokens:
            raise FastgenError("--data: the result has no row for a rule at its default settings")
        scored = {row["variant"]: row for row in rows if row.get("score") is not None}
        levels = []
        for level in self.levels:
            for name, row in scored.items():
                words = name.split()
                exact = scored.get(f"exact {words[1].split('x')[0]}") if len(words) == 3 else None
                if exact is not None and words[0] == "cascade" and words[2] == f"quality={level.quality:g}":
                    stderr = (row["stderr"] ** 2 + exact["stderr"] ** 2) ** 0.5
                    drop = Drop(exact["score"] - row["score"], stderr)
                    level = replace(level, drops={**level.drops, words[1]: drop})
            levels.append(level)
        return replace(self, levels=tuple(levels), pace=made if self.pace is None else self.pace.updated(made))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `calibration.json`."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return path

    def as_dict(self) -> dict[str, Any]:
        """The calibration as a JSON object."""
        made = {
            "about": dict(self.about),
            "levels": [asdict(level) for level in self.levels],
            "sensitivity": self.sensitivity,
        }
        return made if self.pace is None else {**made, "pace": asdict(self.pace)}

    @classmethod
    def of_dict(cls, data: Any, source: object = "the calibration") -> Calibration:
        """Read what `as_dict` returned.

        Args:
            data: parsed JSON.
            source: its name in the message.

        Raises:
            FastgenError: not a calibration.
        """
        try:
            made = [_level(**level) for level in data["levels"]]
            pace = None if data.get("pace") is None else Pace.of_dict(data["pace"])
            levels = tuple(sorted(made, key=lambda level: level.quality))
            return cls(levels, dict(data.get("about", {})), pace, data.get("sensitivity"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FastgenError(f"quality: {source} cannot be read: {error}") from error

    @classmethod
    def for_drafter(cls, folder: str | os.PathLike[str]) -> Calibration | None:
        """The calibration in a drafter's folder or in the saved pipeline around it; None if there is none."""
        if (Path(folder) / FILE).exists():
            return cls.load(folder)
        index = Path(folder).parent / "model_index.json"
        saved = read_object(index).get("calibration") if index.is_file() else None
        return None if saved is None else cls.of_dict(saved, index)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ValueError: it is missing or cannot be read.
        """
        path = Path(folder) / FILE
        if not path.exists():
            raise FastgenError(f"quality: {path} is missing; make it with `fastgen train cascade-calibrate`")
        return cls.of_dict(read_object(path), path)


def sampled_weights(network: Any, names: Sequence[str] | None = None) -> dict[str, float]:
    """One value of a few weights by name; weights that are missing, of 8 bits or less or not in memory are left out.

    Args:
        network: a module; anything else has no weights.
        names: of the weights; None takes some of those with two or more dimensions.
    """
    known = dict(network.named_parameters(remove_duplicate=False)) if isinstance(network, nn.Module) else {}
    if names is None:
        large = [name for name, weight in known.items() if weight.ndim > 1]
        names = large[:: max(1, len(large) // _SAMPLES)][:_SAMPLES]
    plain = {name: known[name].data for name in names if name in known}
    return {
        name: float(weight.flatten()[weight.numel() // 2])
        for name, weight in plain.items()
        if type(weight) is Tensor
        and weight.is_floating_point()
        and weight.element_size() > 1
        and not weight.is_meta
        and weight.numel()
    }


def _level(pairs: Sequence[int], drops: Mapping[str, Sequence[float]] | None = None, **numbers: float) -> Level:
    """A level from JSON values."""
    return Level(**numbers, pairs=tuple(pairs), drops={name: Drop(*drop) for name, drop in (drops or {}).items()})  # type: ignore[arg-type]


class PairRecorder(AcceptanceRule):
    """The exact rule; also records how similar siblings are, and how different the distributions after them.

    Args:
        horizon: levels of descendants compared.
        codebook: for the radius.
    """

    name, loss = "exact", "distribution"
    tables = ("codebook",)
    needs_hidden = True

    def __init__(self, horizon: int, codebook: Tensor) -> None:
        self.horizon, self.codebook = horizon, codebook
        self._seen: list[Tensor] = []

    def verify(self, drafted: Drafted, noise: Noise, spent: Tensor) -> Decisions:
        children, alike = drafted.inner_children(), node_similarity(drafted)
        codes = self.codebook[drafted.child_tokens()]
        moved = sensitivity(drafted, sibling_states(drafted), codes)[..., None, None]
        apart = torch.cdist(codes, codes) * moved
        values = (
            sibling_pairs(alike, children),
            sibling_pairs(convergence(alike, drafted.tree, self.horizon), children),
            apart,
            sibling_pairs(total_variation(drafted.target), children),
            moved.expand_as(apart),
        )
        pairs = drafted.tree.pairs.expand_as(apart)
        self._seen.append(torch.stack([value[pairs] for value in values], dim=1).cpu())
        return strict(drafted, noise)

    @property
    def pairs(self) -> Tensor:
        """[n, 5]: similarity, convergence, predicted distance, total variation and the node's sensitivity for each
        sibling pair."""
        return torch.cat(self._seen) if self._seen else torch.empty(0, 5)


def calibrate_levels(pairs: Tensor, limits: Sequence[tuple[float, float]] = LIMITS) -> Calibration:
    """Thresholds for each limit.

    Args:
        pairs: of a `PairRecorder`.
        limits: (quality, total variation).

    Raises:
        ValueError: too few pairs for a 90th percentile.
    """
    if len(pairs) < _FEWEST_PAIRS:
        raise ValueError(f"pairs: {len(pairs)} sibling pairs are too few, needs {_FEWEST_PAIRS}; draw more pictures")
    alike, met, apart, variation, moved = pairs.unbind(dim=1)
    levels = []
    for quality, limit in limits:
        breadth, wide = _smallest(alike, variation, limit)
        depth, deep = _smallest(met, variation, limit)
        negative, near = _smallest(-apart, variation, limit)
        radius = 0.0 if near == 0 else max(0.0, -negative)
        levels.append(Level(quality, limit, breadth, depth, radius, (wide, deep, near if radius > 0 else 0)))
    finite = moved[moved.isfinite() & (moved > 0)]
    return Calibration(tuple(levels), sensitivity=float(finite.median()) if len(finite) else None)


def _smallest(value: Tensor, variation: Tensor, limit: float) -> tuple[float, int]:
    """The smallest threshold for which 90 % of the pairs at or above it vary by at most `limit`, and the number of
    these pairs; 2 and 0 if there is none."""
    finite = torch.isfinite(value)
    order = value[finite].argsort(descending=True)
    ordered, below = value[finite][order], variation[finite][order] <= limit
    count = torch.arange(1, len(ordered) + 1)
    good = below.cumsum(0) >= _SHARE * count
    good &= count >= min(_FEWEST_PAIRS, len(ordered))
    # A threshold cannot separate equal values: only the last of a run may end the set.
    good &= torch.cat([ordered[1:] < ordered[:-1], torch.ones(1, dtype=torch.bool)]) if len(ordered) else good
    if not bool(good.any()):
        return 2.0, 0
    last = int(good.nonzero().max())
    return float(ordered[last]), last + 1
