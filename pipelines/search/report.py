"""What a search did for each prompt, and which picture it returns."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastgen.pipelines.search.engine import Chain, Node
from fastgen.pipelines.search.policy import Policy
from fastgen.pipelines.search.thresholds import Threshold

__all__ = ["SearchReport", "report_of", "reports_of", "taus_of"]


@dataclass(frozen=True)
class SearchReport:
    """One prompt's search.

    Attributes:
        prompt: what was drawn.
        policy: with its threshold.
        taus: the threshold at each time; None where there is none, or one that depends on what was seen before.
        score: of the returned picture by the verifier; None where it had none.
        nfe: forward passes of the model on one sample.
        evaluations: of samples; with classifier-free guidance an evaluation takes two forward passes.
        starts: evaluations at the first time.
        tries: by chain, evaluations of each transition.
        accepted: by chain, whether each transition continued with a candidate that was accepted.
        forced: transitions that continued with a candidate that was not accepted.
        tries_by_time: histogram over all chains: evaluations at each time.
        finished: whether the picture is the end of a trajectory (else a preview of one that was cut short).
        stopped: "finished", "target", "time" or "interrupted".
        seconds: of the call until this prompt's report was written.
        trees: by chain, rows of [number, parent, time, score] of all evaluations, for the picture of the search.
        path: numbers of the nodes that led to the picture, in chain `chain`.
        chain: that the picture comes from.
        flops: of its evaluations and scored pictures, a shared forward pass in equal parts; None where
            nothing counted them (`fastgen.accounting.count_flops`).
        sampler: of stochastic transitions; None where the trajectories are those of the ODE.
        replaced: what the search put in the place of the pipeline's own, and why: "scheduler", "sampler".
    """

    prompt: str
    policy: str
    taus: list[float | None]
    score: float | None
    nfe: int
    evaluations: int
    starts: int
    tries: list[list[int]]
    accepted: list[list[bool]]
    forced: int
    tries_by_time: list[int]
    finished: bool
    stopped: str
    seconds: float
    trees: list[list[list[float | None]]]
    path: list[int]
    chain: int
    flops: int | None = None
    sampler: str | None = None
    replaced: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def report_of(
    prompt: Any,
    policy: Policy,
    chains: Sequence[Chain],
    winner: Node,
    owner: int,
    stopped: str,
    seconds: float,
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
        policy=policy.description,
        taus=taus_of(policy, len(histogram)),
        score=winner.score if math.isfinite(winner.score) else None,
        nfe=pool.nfe,
        evaluations=pool.spent,
        starts=sum(visit.parent < 0 for chain in chains for visit in chain.trace),
        tries=[[tries for tries, _ in chain.tries] for chain in chains],
        accepted=[[accepted for _, accepted in chain.tries] for chain in chains],
        forced=sum(not accepted for chain in chains for _, accepted in chain.tries),
        tries_by_time=histogram,
        finished=winner.last,
        stopped=stopped,
        seconds=seconds,
        trees=[[visit.row() for visit in chain.trace] for chain in chains],
        path=path,
        chain=owner,
        flops=round(pool.flops) if pool.flops else None,
    )


def reports_of(
    policy: Policy,
    prompts: Sequence[str],
    chains: Sequence[Chain],
    ends: Sequence[Node | None],
    started: float,
    interrupted: bool,
) -> tuple[list[SearchReport], list[Node]]:
    """For each prompt its report and the node of the returned picture."""
    reports, winners = [], []
    for number, prompt in enumerate(prompts):
        own = [chain for chain in chains if chain.prompt == number]
        found = [
            (chain, end) for chain, end in zip(chains, ends, strict=True) if chain.prompt == number and end is not None
        ]
        owner, winner = max(found, key=lambda pair: _finished(pair[1]))  # of equal ones the first chain's
        pool = owner.pool
        stopped = "interrupted" if interrupted else "target" if pool.done else "time" if pool.late else "finished"
        seconds = time.perf_counter() - started
        reports.append(report_of(prompt, policy, own, winner, owner.number, stopped, seconds))
        winners.append(winner)
    return reports, winners


def _finished(node: Node) -> tuple[bool, bool, float]:
    """Without a fault, ends of trajectories before previews, then by score."""
    score = -math.inf if math.isnan(node.score) else node.score
    return node.fault is None, node.last, score


def taus_of(policy: Policy, times: int) -> list[float | None]:
    """The policy's threshold at each time; None where it has none, or one that depends on what was seen before."""
    rule = getattr(policy, "rule", None)
    if not isinstance(rule, Threshold):
        return [None] * times
    # Of a chain that has seen nothing, rules that look back say that anything is good enough.
    taus = [rule.at(index, (), -math.inf, -math.inf) for index in range(times)]
    return [tau if math.isfinite(tau) else None for tau in taus]
