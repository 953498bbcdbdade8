"""What `tree=None` drafts with: the source of the least expected time, from measured costs and acceptance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """Tokens and seconds of a round.

    Attributes:
        tokens: by acceptance rule and source: of a round, the bonus counted.
        seconds: by `machine_of` and source: of a round, one picture at a time; of "plain" the seconds of a token.

    Raises:
        FastgenError: no such source, or a number that is not above 0.
    """

    tokens: Table
    seconds: Table

    def __post_init__(self) -> None:
        for label, table in (("tokens", self.tokens), ("seconds", self.seconds)):
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
        if not isinstance(data, Mapping) or set(data) != {"tokens", "seconds"}:
            raise FastgenError("pace: needs tokens and seconds")
        if not all(isinstance(row, Mapping) for table in data.values() for row in _rows(table)):
            raise FastgenError("pace: needs numbers by source")
        return cls(data["tokens"], data["seconds"])

    def fastest(self, rule: str, machine: str, layers: int, usable: Callable[[str], bool]) -> tuple[str, str]:
        """A source and why: the least expected seconds a token; the plain loop where none is faster.

        On a kind of device that nobody measured, a round is counted as a token of the plain loop, and each level that
        a drafter adds as one of the target's layers.

        Args:
            rule: which accepts; one that nobody measured is counted as the exact one.
            machine: see `machine_of`.
            layers: of the target.
            usable: whether the parts of a source are there, and the rule takes it.
        """
        known = self.tokens.get(rule) or self.tokens.get("exact", {})
        measured = self.seconds.get(machine)
        costs = {name: 1 + levels_of(name) / layers for name in (*known, PLAIN)} if measured is None else measured
        paces = {
            name: costs[name] / (1.0 if name == PLAIN else known[name])
            for name in costs
            if name == PLAIN or (name in known and usable(name))
        }
        best = min(paces, key=lambda name: paces[name])
        how = f"measured on {machine}" if measured is not None else f"nobody measured {machine}: by passes and levels"
        return best, f"least expected time, {how}"


def _rows(table: Any) -> list[Any]:
    return list(table.values()) if isinstance(table, Mapping) else [table]
