"""What `tree=None` drafts with: the source of the least expected time, from measured costs and acceptance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastgen.checks import check_number
from fastgen.drafters.names import PLAIN, check_tree_name, levels_of
from fastgen.errors import FastgenError

__all__ = ["Pace", "machine_of"]

Table = Mapping[str, Mapping[str, float]]


def machine_of(device: str, compiled: bool) -> str:
    """Name of a kind of device, as costs are kept by."""
    return f"{device} {'compiled' if compiled else 'eager'}"


@dataclass(frozen=True)
class Pace:
    """Tokens and cost of a round, one picture at a time.

    Attributes:
        tokens: by acceptance rule and source: of a round, the bonus counted.
        costs: by `machine_of` and source: of a round, in tokens of the plain loop.

    Raises:
        FastgenError: no such source, or a number that is not above 0.
    """

    tokens: Table
    costs: Table

    def __post_init__(self) -> None:
        for label, table in (("tokens", self.tokens), ("costs", self.costs)):
            for row in table.values():
                for name, value in row.items():
                    check_tree_name(f"pace: {label}", name)
                    check_number(f"pace: {label} of {name}", value, above=0)

    @classmethod
    def of_dict(cls, data: Any) -> Pace:
        """What JSON holds.

        Raises:
            FastgenError: it is none.
        """
        if not isinstance(data, Mapping) or set(data) != {"tokens", "costs"}:
            raise FastgenError("pace: needs tokens and costs")
        if not all(isinstance(row, Mapping) for table in data.values() for row in _rows(table)):
            raise FastgenError("pace: needs numbers by source")
        return cls(data["tokens"], data["costs"])

    def fastest(self, rule: str, machine: str, layers: int, usable: Callable[[str], bool]) -> tuple[str, str]:
        """A source and why: the least expected seconds a token; the plain loop where none is faster.

        On a kind of device that was not measured, a round is counted as a token of the plain loop, and each level that
        a drafter adds as one of the target's layers.

        Args:
            rule: which accepts; one that was not measured is counted as the exact one.
            machine: see `machine_of`.
            layers: of the target.
            usable: whether the parts of a source are there, and the rule takes it.
        """
        known = self.tokens.get(rule) or self.tokens.get("exact", {})
        measured = self.costs.get(machine)
        costs = {name: 1 + levels_of(name) / layers for name in known} if measured is None else measured
        paces = {name: costs[name] / known[name] for name in known if name in costs and usable(name)}
        best = min({**paces, PLAIN: 1.0}.items(), key=lambda pair: pair[1])[0]
        how = f"measured on {machine}" if measured is not None else f"{machine} was not measured: by passes and levels"
        return best, f"least expected time, {how}"

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]], machine: str) -> Pace:
        """From rows of `fastgen bench speculative` on one machine, with default settings of each rule."""
        plain = min(row["seconds"]["p50"] for row in rows if row["variant"].startswith("plain loop"))
        tokens: dict[str, dict[str, float]] = {}
        costs: dict[str, float] = {}
        for row in rows:
            words = row["variant"].split()
            usual = len(words) == 2 or words[2:] == ["quality=0.5"]
            if row["rule"] is None or not usual or "@" in words[1] or words[1] in ("auto", PLAIN):
                continue
            tokens.setdefault(row["rule"], {})[words[1]] = 1 / row["target_pass_ratio"]
            cost = row["seconds"]["p50"] / plain / row["target_pass_ratio"]
            costs[words[1]] = max(cost, costs.get(words[1], 0.0))
        return cls(tokens, {machine: costs} if costs else {})

    def updated(self, other: Pace) -> Pace:
        """With what another one measured, in place of what is known."""
        tables = [
            {key: {**old.get(key, {}), **new.get(key, {})} for key in {**old, **new}}
            for old, new in ((self.tokens, other.tokens), (self.costs, other.costs))
        ]
        return Pace(*tables)


def _rows(table: Any) -> list[Any]:
    return list(table.values()) if isinstance(table, Mapping) else [table]
