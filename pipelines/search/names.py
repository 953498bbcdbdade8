"""The policies by name."""

from __future__ import annotations

from typing import Any

from fastgen.pipelines.search.policies import Rollover, Threshold, ValueSampling
from fastgen.pipelines.search.policy import Policy
from fastgen.pipelines.search.populations import Blockwise, MonteCarlo, SearchOverPaths
from fastgen.pipelines.search.starts import BestOfN, RandomSearch, ZeroOrder

__all__ = ["POLICIES", "named_policy"]

POLICIES: dict[str, type[Policy]] = {
    kind.name: kind
    for kind in (
        Threshold,
        Rollover,
        ValueSampling,
        Blockwise,
        MonteCarlo,
        BestOfN,
        RandomSearch,
        ZeroOrder,
        SearchOverPaths,
    )
}


def named_policy(name: str, **settings: Any) -> Policy:
    """A policy with its settings.

    Raises:
        ValueError: unknown name, or a setting that the policy does not have or that is out of range.
    """
    if name not in POLICIES:
        raise ValueError(f"policy: {name!r} is unknown, there are {', '.join(POLICIES)}")
    try:
        return POLICIES[name](**settings)
    except TypeError as error:
        raise ValueError(f"policy: {name} {error}") from None
