"""From the pictures and records of `fastgen bench search` to its rows and statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastgen.errors import FastgenError
from fastgen.evaluation.benchmarks.search_statistics import (
    Outcomes,
    Resampling,
    Values,
    compare,
    diversity,
    mixture,
    reach,
)
from fastgen.evaluation.benchmarks.search_variants import NONE, Search
from fastgen.evaluation.fid.extractors import ShapesNetwork
from fastgen.evaluation.geneval.metadata import Metadata
from fastgen.evaluation.geneval.shapes_checker import ShapesChecker, ShapesModel, to_model_size
from fastgen.evaluation.measures import policy_family
from fastgen.evaluation.runner import Sample, judge_samples
from fastgen.evaluation.verifiers.base import Verifier, picture_scores
from fastgen.io import read_object

__all__ = ["OURS", "Row", "rows_of", "statistics_of"]

#: The policy that the others are compared with.
OURS = "threshold"
_BATCH = 64  # pictures at once


@dataclass(frozen=True)
class Row:
    """A policy at a budget.

    Attributes:
        method: name of the policy.
        outcomes: by prompt.
        data: JSON-ready.
    """

    method: str
    outcomes: Outcomes
    data: dict[str, Any]


def rows_of(
    searches: Sequence[Search],
    prompts: Sequence[tuple[int, Metadata]],
    seeds: int,
    detector: ShapesModel,
    verifier: Verifier,
    heldout: Verifier | None,
    by: Resampling,
    device: str = "cpu",
) -> list[Row]:
    """Score all pictures.

    Args:
        searches: all of them done; the first one is the pipeline without a search.
        prompts: with their places.
        seeds: of each prompt.
        detector: of the checker.
        verifier, heldout: score the pictures that were found.
        by: the prompts.
        device: of the detector.

    Returns:
        of each search: policy, method, budget, settings, description; nfe, evaluations, verifier_calls and seconds of
        a search on average (with seconds_ci and the seconds of its phases); score with score_ci (95 %
        over prompts), tasks, gain over the pipeline without a search with gain_ci, and task_gains; searched and
        heldout: mean scores of both verifiers (heldout None without one) with intervals; diversity: mean distance of
        two pictures of a prompt in the detector's features (None with one seed); forced transitions, the share that
        finished, and evaluations at each time, on average; n searches.
    """
    tags = [item.tag for _, item in prompts]
    network = ShapesNetwork(detector, device=device)
    rows: list[Row] = []
    for search in searches:
        pictures = _pictures(search, prompts, seeds)
        shape = (len(prompts), seeds)
        judged = judge_samples(pictures, ShapesChecker(detector, device=device))
        correct = np.array([result.correct for result in judged], dtype=np.float64).reshape(shape).mean(axis=1)
        records = [read_object(sample.path.with_suffix(".json")) for sample in pictures]
        means = {
            name: np.array([float(record[name]) for record in records]).reshape(shape).mean(axis=1)
            for name in ("seconds", "nfe", "evaluations", "verifier_calls", "forced", "finished")
        }
        images = torch.stack([torch.from_numpy(sample.load().copy()) for sample in pictures])
        features = _batched(lambda part: network(to_model_size(part))["pool"].double(), images).reshape(*shape, -1)
        base = rows[0].outcomes.correct if rows else correct
        data: dict[str, Any] = {
            "policy": search.variant.name,
            "method": search.variant.policy,
            "budget": search.budget,
            "settings": search.settings,
            "description": _same(search, records),
            **{name: by.mean(values) for name, values in means.items()},
            "seconds_ci": by.interval(means["seconds"]),
            "phases": _phases(records),
            "score": by.mean(correct),
            "score_ci": by.interval(correct),
            "tasks": _by_task(correct, tags),
            "gain": by.mean(correct - base),
            "gain_ci": by.interval(correct - base),
            "task_gains": _by_task(correct - base, tags),
            **_verified("searched", verifier, images, pictures, shape, by),
            **_verified("heldout", heldout, images, pictures, shape, by),
            "diversity": diversity(features.numpy(), by),
            "evaluations_by_time": _by_time(records),
            "n": len(records),
        }
        rows.append(Row(search.variant.policy, Outcomes(correct, means["seconds"], means["nfe"]), data))
    return rows


def _pictures(search: Search, prompts: Sequence[tuple[int, Metadata]], seeds: int) -> list[Sample]:
    return [Sample(search.picture(place, seed), place, item) for place, item in prompts for seed in range(seeds)]


def _same(search: Search, records: Sequence[dict[str, Any]]) -> str:
    """The policy's description, the same in all searches."""
    found = {str(record["policy"]) for record in records}
    if len(found) > 1:
        which = "; ".join(sorted(found))
        raise FastgenError(f"{search.folder}: has searches with other thresholds ({which}); choose another folder")
    return found.pop()


def _phases(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(name for record in records for name in record["phases"])
    return {name: float(np.mean([record["phases"].get(name, 0.0) for record in records])) for name in names}


def _by_time(records: Sequence[dict[str, Any]]) -> list[float]:
    longest = max(len(record["tries_by_time"]) for record in records)
    padded = [record["tries_by_time"] + [0] * (longest - len(record["tries_by_time"])) for record in records]
    return [float(mean) for mean in np.mean(padded, axis=0)]


def _by_task(values: Values, tags: Sequence[str]) -> dict[str, float]:
    names = np.array(tags)
    return {tag: float(values[names == tag].mean()) for tag in dict.fromkeys(tags)}


@torch.no_grad()
def _batched(network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    return torch.cat([network(images[first : first + _BATCH]) for first in range(0, len(images), _BATCH)])


def _verified(
    name: str,
    verifier: Verifier | None,
    images: torch.Tensor,
    pictures: Sequence[Sample],
    shape: tuple[int, int],
    by: Resampling,
) -> dict[str, Any]:
    """The mean score of a verifier, with its interval."""
    if verifier is None:
        return {name: None, f"{name}_ci": None}
    prompts = [sample.metadata.prompt for sample in pictures]
    values = picture_scores(verifier, images.numpy(), prompts, _BATCH).reshape(shape).mean(axis=1)
    return {name: by.mean(values), f"{name}_ci": by.interval(values)}


def statistics_of(rows: Sequence[Row], by: Resampling) -> dict[str, Any]:
    """Thresholds compared with every other policy.

    Returns:
        "comparisons": every threshold row against the row of every rival that takes as many seconds, or the least
        more (where all take fewer, the slowest one, and "slower" is False): see `compare`. "equal": the same against
        a mixture of the two budgets of a rival whose seconds lie on both sides, in the shares with which it takes as
        many; nothing where they do not. "reach": what a threshold pays for the score of every rival at its largest
        budget, in seconds and in forward passes: see `reach`.
    """
    curves: dict[str, list[Row]] = {}
    for row in rows:
        curves.setdefault(row.data["policy"], []).append(row)
    comparisons = []
    for name, curve in curves.items():
        for rival, others in curves.items():
            if not _rivals(curve[0], others[0]):
                continue
            for row in curve:
                other = _as_slow(row, others)
                comparisons.append(
                    {
                        **{"policy": name, "budget": row.data["budget"], "seconds": row.data["seconds"]},
                        **{"rival": rival, "rival_budget": other.data["budget"]},
                        **{"rival_seconds": other.data["seconds"]},
                        "slower": other.data["seconds"] >= row.data["seconds"],
                        **compare(row.outcomes, other.outcomes, by),
                    }
                )
    return {"comparisons": comparisons, "equal": _equal(rows, by), "reach": _reached(rows, by)}


def _families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by policy; names that differ only in `max_nfe` are budgets of one policy."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(policy_family(row.data["policy"]), []).append(row)
    return families


def _reached(rows: Sequence[Row], by: Resampling) -> list[dict[str, Any]]:
    """Cost of each policy for its rivals' score at the largest budget."""
    found, families = [], _families(rows)
    for name, curve in families.items():
        for rival, others in families.items():
            if not _rivals(curve[0], others[0]):
                continue
            goal = max(others, key=lambda row: row.data["budget"])
            points = [row.outcomes for row in curve]
            for cost in ("seconds", "nfe"):
                named = {"policy": name, "rival": rival, "rival_budget": goal.data["budget"], "unit": cost}
                target = {"target": goal.data["score"]}
                found.append({**named, **target, **reach(points, goal.outcomes, cost, by)})
    return found


def _equal(rows: Sequence[Row], by: Resampling) -> list[dict[str, Any]]:
    """Comparisons at equal mean seconds."""
    found, families = [], _families(rows)
    for row in rows:
        for rival, others in families.items():
            if not _rivals(row, others[0]):
                continue
            seconds = row.data["seconds"]
            faster = [other for other in others if other.data["seconds"] <= seconds]
            slower = [other for other in others if other.data["seconds"] > seconds]
            if not (faster and slower):
                continue
            low = max(faster, key=lambda other: other.data["seconds"])
            high = min(slower, key=lambda other: other.data["seconds"])
            share = (high.data["seconds"] - seconds) / (high.data["seconds"] - low.data["seconds"])
            found.append(
                {
                    **{"policy": row.data["policy"], "budget": row.data["budget"], "seconds": seconds},
                    **{"rival": rival, "rival_budgets": [low.data["budget"], high.data["budget"]], "share": share},
                    "rival_score": share * low.data["score"] + (1 - share) * high.data["score"],
                    **compare(row.outcomes, mixture(low.outcomes, high.outcomes, share), by),
                }
            )
    return found


def _rivals(ours: Row, theirs: Row) -> bool:
    """Whether a policy is compared with another."""
    return ours.method == OURS and theirs.method not in (OURS, NONE)


def _as_slow(row: Row, others: Sequence[Row]) -> Row:
    """The fastest of the others that is not faster than the row, else the slowest."""
    slower = [other for other in others if other.data["seconds"] >= row.data["seconds"]]
    if slower:
        return min(slower, key=lambda other: other.data["seconds"])
    return max(others, key=lambda other: other.data["seconds"])
