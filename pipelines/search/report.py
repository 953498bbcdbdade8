"""What a search did for one prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastgen.pipelines.search.engine import Chain, Node

__all__ = ["SearchReport", "report_of"]


@dataclass(frozen=True)
class SearchReport:
    """One prompt's search.

    Attributes:
        prompt: what was drawn.
        policy: with its threshold.
        score: of the returned picture by the verifier; None where it had none.
        nfe: forward passes of the model on one sample.
        evaluations: of samples; with classifier-free guidance an evaluation takes two forward passes.
        starts: evaluations at the first time.
        tries: by chain, evaluations of each transition.
        forced: transitions that were gone on from with a candidate that was not accepted.
        tries_by_time: histogram over all chains: evaluations at each time.
        finished: whether the picture is the end of a trajectory (else a preview of one that was cut short).
        stopped: "finished", "target", "time" or "interrupted".
        seconds: of the call until this prompt's report was written.
        trees: by chain, rows of [number, parent, time, score] of all evaluations, for the picture of the search.
        path: numbers of the nodes that led to the picture, in chain `chain`.
        chain: that the picture comes from.
    """

    prompt: str
    policy: str
    score: float | None
    nfe: int
    evaluations: int
    starts: int
    tries: list[list[int]]
    forced: int
    tries_by_time: list[int]
    finished: bool
    stopped: str
    seconds: float
    trees: list[list[list[float | None]]]
    path: list[int]
    chain: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def report_of(
    prompt: Any, policy: str, chains: Sequence[Chain], winner: Node, owner: int, stopped: str, seconds: float
) -> SearchReport:
    """The report of one prompt's chains, of which `owner` made the picture."""
    pool = chains[0].pool
    last = max((visit.index for chain in chains for visit in chain.trace), default=0)
    histogram = [0] * (last + 1)
    for chain in chains:
        for visit in chain.trace:
            histogram[visit.index] += 1
    path: list[int] = []
    node: Node | None = winner
    while node is not None:
        path.insert(0, node.number)
        node = node.parent
    return SearchReport(
        prompt=str(prompt),
        policy=policy,
        score=winner.score if math.isfinite(winner.score) else None,
        nfe=pool.nfe,
        evaluations=pool.spent,
        starts=sum(visit.parent < 0 for chain in chains for visit in chain.trace),
        tries=[[tries for tries, _ in chain.tries] for chain in chains],
        forced=sum(not accepted for chain in chains for _, accepted in chain.tries),
        tries_by_time=histogram,
        finished=winner.last,
        stopped=stopped,
        seconds=seconds,
        trees=[
            [[v.number, v.parent, v.index, v.score if math.isfinite(v.score) else None] for v in chain.trace]
            for chain in chains
        ],
        path=path,
        chain=owner,
    )
