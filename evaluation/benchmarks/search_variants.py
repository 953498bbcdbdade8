"""The searches that `fastgen bench search` compares: their names, and how each is scaled to a budget.

Every policy is to spend about its budget. With E = budget / forward passes of an evaluation, and T evaluations of a
trajectory:

- threshold: nothing is scaled; it may spend the budget and stops when its threshold lets it.
- rbf: a tenth of E on starts, as 50 of 500 in arXiv 2503.19385; the rest is its quotas, which spend all of it.
- svdd, code: K = E / (beams T) candidates.
- smc: E / T particles. best-of-n: E / T pictures. random: as many whole rounds as there are.
- zero-order: up to 4 neighbours, as many rounds as there are.
- search-over-paths: as many copies as the closed form of its cost allows.

Where a method was published with two chains (rbf, svdd, code, search-over-paths), it gets two, or one where two would
spend less of the budget or leave no two candidates to choose from. What a variant sets itself is not scaled.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from fastgen.pipelines.loading.checkpoint import Checkpoint
from fastgen.pipelines.noise_search import NoiseSearchPipeline
from fastgen.pipelines.search.budget import Budget
from fastgen.pipelines.search.names import POLICIES, named_policy
from fastgen.pipelines.search.policy import Policy
from fastgen.pipelines.search.populations import SearchOverPaths
from fastgen.pipelines.search.thresholds import BestSoFar, OnlineQuantile, PreviousPlus, Threshold
from fastgen.pipelines.settings import pipeline_arguments

__all__ = ["NONE", "VARIANTS", "Search", "Variant", "call_of", "parse_variant", "scaled"]

#: The pipeline without a search.
NONE = "none"

#: What is compared by default, besides the pipeline without a search.
VARIANTS = tuple(POLICIES)

# Arguments of a search that the benchmark sets itself.
_FIXED = {
    *("self", "prompt", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt", "generator"),
    *("max_nfe", "max_seconds", "batch_size", "output_type", "return_dict", "on_round", "pipeline_kwargs"),
}
_THRESHOLD = re.compile(r"(best-so-far)|(online-quantile|previous)\(([-+.\de]+)\)")


@dataclass(frozen=True)
class Variant:
    """A policy with settings.

    Attributes:
        name: as it was written.
        policy: name of the policy, or "none".
        settings: of the policy.
        arguments: of `NoiseSearchPipeline.__call__`.
        thresholds: of `NoiseSearchPipeline`.
        max_nfe: the one budget that it is measured at; None: all of the benchmark.
    """

    name: str
    policy: str
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    thresholds: str | None = None
    max_nfe: int | None = None


@dataclass(frozen=True)
class Search:
    """One row: a policy at a budget.

    Attributes:
        variant: as the user wrote it.
        budget: forward passes for each prompt; None for the pipeline without a search.
        pipeline: with the policy that is scaled to the budget.
        folder: of its pictures and records.
    """

    variant: Variant
    budget: int | None
    pipeline: NoiseSearchPipeline
    folder: Path

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-ready: of the policy and of the search."""
        policy = self.pipeline.policy
        own = {} if policy is None else {key: _plain(value) for key, value in vars(policy).items()}
        file = {} if self.variant.thresholds is None else {"thresholds": self.variant.thresholds}
        return json.loads(json.dumps({**own, **self.variant.arguments, **file}))

    def picture(self, prompt: int, seed: int) -> Path:
        """File name of a search; its record has the suffix .json."""
        return self.folder / f"{prompt:05d}-{seed:04d}.png"


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__, **asdict(value)}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def parse_variant(text: str) -> Variant:
    """ "POLICY [SETTING=VALUE …]", e.g. "threshold tau=0.7 starts=4" or "svdd chains=1 sampler=rollover".

    A setting is one of the policy, an argument of `NoiseSearchPipeline.__call__`, `thresholds`, the file of calibrated
    ones, or `max_nfe`, its own budget. A tau is a number, "best-so-far", "online-quantile(Q)" or
    "previous(DELTA)".

    Raises:
        ValueError: it cannot be read, there is no such policy or setting, or one is out of range.
    """
    name, *words = text.split() or [""]
    if name not in (NONE, *POLICIES):
        raise ValueError(f"policy: {name!r} is unknown, there are {', '.join((NONE, *POLICIES))}")
    own = set() if name == NONE else {item.name for item in fields(POLICIES[name])}  # type: ignore[arg-type]
    further = set() if name == NONE else set(inspect.signature(NoiseSearchPipeline.__call__).parameters) - _FIXED
    if name == "threshold":
        further.add("thresholds")
    if name != NONE:
        further.add("max_nfe")
    given: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value or key in given:
            raise ValueError(f'policy: {text!r} is not of the form "POLICY [SETTING=VALUE …]"')
        if key not in own | further:
            known = ", ".join(sorted(own | further)) or "none"
            raise ValueError(f"policy: {name} has no setting {key!r}, there are {known}")
        given[key] = value if key == "thresholds" else _value(value)
    file, own_budget = given.pop("thresholds", None), given.pop("max_nfe", None)
    if own_budget is not None and (not isinstance(own_budget, int) or own_budget < 1):
        raise ValueError(f"max_nfe: {own_budget} is not allowed, needs an integer >= 1")
    settings = {key: value for key, value in given.items() if key in own}
    if name != NONE:
        named_policy(name, **settings)
    arguments = {key: value for key, value in given.items() if key not in own}
    return Variant(text, name, settings, arguments, file, own_budget)


def call_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model's own settings as arguments of a diffusers pipeline."""
    own = pipeline_arguments(checkpoint.defaults)
    return {name: own[name] for name in ("height", "width", "num_inference_steps", "guidance_scale") if name in own}


def _value(text: str) -> Any:
    """A number, a truth value, a threshold or a word."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    if text in ("true", "false"):
        return text == "true"
    if (found := _THRESHOLD.fullmatch(text)) is None:
        return text
    kinds: dict[str, Callable[[float], Threshold]] = {"online-quantile": OnlineQuantile, "previous": PreviousPlus}
    return BestSoFar() if found[1] else kinds[found[2]](float(found[3]))


def scaled(variant: Variant, budget: int, forwards: int, times: int) -> Policy:
    """The variant's policy at a budget.

    Args:
        variant: any but "none".
        budget: forward passes of the model on one sample.
        forwards: of them in an evaluation; two with classifier-free guidance.
        times: evaluations of a trajectory.

    Raises:
        ValueError: the budget is too small for it; says why.
    """
    own, rule = variant.settings, _RULES.get(variant.policy)
    policy = named_policy(variant.policy, **{**(rule(budget // forwards, times, own) if rule else {}), **own})
    policy.check(Budget(budget), times - 1, forwards)
    return policy


def _widest(chains: str, count: str, cost: Callable[[int, int], int], evaluations: int, own: dict[str, Any]) -> Any:
    """Two chains or one, each with as many candidates (two at least) as `evaluations` pay for: what spends more.

    Args:
        chains, count: names of the two settings.
        cost: evaluations that a number of chains and candidates takes.
    """
    if count in own:
        return {}
    found = []
    for number in (own[chains],) if chains in own else (2, 1):
        size = 1
        while cost(number, size + 1) <= evaluations:
            size += 1
        if size > 1:
            found.append((number, size))
    if not found:
        raise ValueError(f"{evaluations} evaluations are too few for a choice between two {count}")
    number, size = max(found, key=lambda pair: cost(*pair))
    return {chains: number, count: size}


def _beams(evaluations: int, times: int, own: dict[str, Any]) -> Any:
    return _widest("chains", "candidates", lambda chains, size: chains * size * times, evaluations, own)


def _rollover(evaluations: int, times: int, own: dict[str, Any]) -> dict[str, int]:
    chosen = {}
    for chains in (own["chains"],) if "chains" in own else (2, 1):
        chosen = {"chains": chains, "starts": max(1, round(evaluations / 10 / chains))}
        if chains * (own.get("starts", chosen["starts"]) + times) <= evaluations:
            break
    return chosen


def _whole(name: str) -> Callable[[int, int, dict[str, Any]], dict[str, int]]:
    """As many trajectories as there are evaluations for."""

    def rule(evaluations: int, times: int, own: dict[str, Any]) -> dict[str, int]:
        if evaluations < 2 * times and name not in own:
            raise ValueError(f"{evaluations} evaluations are too few for two trajectories of {times}")
        return {name: evaluations // times}

    return rule


def _zero_order(evaluations: int, times: int, own: dict[str, Any]) -> dict[str, int]:
    return {"neighbours": min(4, _whole("neighbours")(evaluations, times, own)["neighbours"] - 1)}


def _paths(evaluations: int, times: int, own: dict[str, Any]) -> Any:
    def cost(seeds: int, copies: int) -> int:
        return SearchOverPaths(**{**own, "seeds": seeds, "copies": copies}).least(times - 1)

    return _widest("seeds", "copies", cost, evaluations, own)


_RULES: dict[str, Callable[[int, int, dict[str, Any]], dict[str, int]]] = {
    "rbf": _rollover,
    "svdd": _beams,
    "code": _beams,
    "smc": _whole("particles"),
    "best-of-n": _whole("n"),
    "zero-order": _zero_order,
    "search-over-paths": _paths,
}
