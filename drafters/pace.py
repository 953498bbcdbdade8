"""What `tree=None` drafts with: the source with the least expected time, from measurements; else the plain loop."""

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
    """A kind of device, as a key for times."""
    return f"{device} {'compiled' if compiled else 'eager'}"


@dataclass(frozen=True)
class Pace:
    """Measured gains and costs of sources.

    Attributes:
        tokens: tokens per round of one picture, bonus included, by acceptance rule and source.
        times: time of a batch as a multiple of the plain loop's, by `machine_of`, pictures in a batch, acceptance rule
            and source.

    Raises:
        FastgenError: an unknown source or batch, or a number that is not above 0.
    """

    tokens: Table
    times: Mapping[str, Mapping[str, Table]]

    def __post_init__(self) -> None:
        batches = [table for made in self.times.values() for table in made.items()]
        for size, _ in batches:
            if not size.isdecimal() or int(size) < 1:
                raise FastgenError(f"pace: {size!r} is not a number of pictures")
        for table in (self.tokens, *(table for _, table in batches)):
            for row in table.values():
                for name, value in row.items():
                    check_tree_name("pace", name)
                    check_number(f"pace: {name}", value, above=0)

    @classmethod
    def of_dict(cls, data: Any) -> Pace:
        """Read it from JSON.

        Raises:
            FastgenError: other keys or values.
        """
        if not isinstance(data, Mapping) or set(data) != {"tokens", "times"}:
            raise FastgenError("pace: needs tokens and times")
        if _depth(data["tokens"]) - {2} or _depth(data["times"]) - {4}:
            raise FastgenError("pace: needs numbers by source")
        return cls(data["tokens"], data["times"])

    def fastest(
        self, rule: str, machine: str, batch: int, layers: int, usable: Callable[[str], bool]
    ) -> tuple[str, str]:
        """The source with the least expected time, and the reason; the plain loop if none is known to be faster.

        A batch size that was not measured uses the next larger measured one: drafting gains less in larger batches. On
        a kind of device that was not measured, a round of one picture counts as one token of the plain loop, and each
        level of a drafter as one of the target's layers.

        Args:
            rule: acceptance rule.
            machine: see `machine_of`.
            batch: pictures drawn at once.
            layers: of the target.
            usable: whether a source's parts are available, and the rule accepts it.
        """
        if machine in self.times:
            known = self.times[machine]
            measured = min((int(size) for size in known if int(size) >= batch), default=None)
            times = {} if measured is None else known[str(measured)].get(rule, {})
            how = f"measured on {machine} in batches of {measured or batch}"
        else:
            known_tokens = self.tokens.get(rule, {}) if batch == 1 else {}
            times = {name: (1 + levels_of(name) / layers) / known_tokens[name] for name in known_tokens}
            how = f"{machine} was not measured: by passes and levels"
        if not times:
            return PLAIN, f'{rule} in batches of {batch} was not measured on {machine}; tree="auto" measures it'
        times = {name: time for name, time in times.items() if usable(name)}
        best = min({**times, PLAIN: 1.0}.items(), key=lambda pair: pair[1])[0]
        return best, f"least expected time, {how}"

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]], machine: str) -> Pace:
        """From rows of `fastgen bench speculative` on one machine, at each rule's default settings."""
        plain = [_seconds(row) for row in rows if row["variant"].startswith("plain loop")]
        tokens: dict[str, dict[str, float]] = {}
        times: dict[str, dict[str, dict[str, float]]] = {}
        for row in rows:
            words = row["variant"].split()
            usual = len(words) == 2 or words[2:] == ["quality=0.5"]
            if row["rule"] is None or not usual or "@" in words[1] or words[1] in ("auto", PLAIN):
                continue
            tokens.setdefault(row["rule"], {})[words[1]] = 1 / row["target_pass_ratio"]
            for batch, seconds in _seconds(row).items():
                if others := [made[batch] for made in plain if batch in made]:
                    times.setdefault(batch, {}).setdefault(row["rule"], {})[words[1]] = seconds / min(others)
        return cls(tokens, {machine: times} if times else {})

    def updated(self, other: Pace) -> Pace:
        """A copy with the newer measurements of `other`.

        The sources of a machine, batch and rule are replaced as a whole: their times are multiples of one run's plain
        loop, and those of two runs do not compare.
        """
        return Pace(_merged(self.tokens, other.tokens, 2), _merged(self.times, other.times, 3))


def _seconds(row: Mapping[str, Any]) -> dict[str, float]:
    """Seconds per picture, by pictures in a batch."""
    return {size: 60 / speed for size, speed in row.get("pictures_a_minute", {}).items()} | {
        "1": row["seconds"]["p50"]
    }


def _merged(old: Any, new: Any, levels: int) -> Any:
    """Nested tables with the newer entries; below `levels` of them a newer table replaces the older one."""
    if not levels:
        return new
    return {**old, **{key: _merged(old.get(key, {}), value, levels - 1) for key, value in new.items()}}


def _depth(table: Any) -> set[int]:
    """Depths at which a nested table has numbers; empty tables are ignored."""
    if not isinstance(table, Mapping):
        return {0}
    return {depth + 1 for value in table.values() if value != {} for depth in _depth(value)}
