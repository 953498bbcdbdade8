"""`tree="auto"`: the fastest tree or window on this device for this target (hardware-aware sizing).

A round costs one target pass over n nodes, one drafter step per level, and a fixed part; it yields the accepted path
and one more token. The costs are measured, and so is how often the j-th child at depth d is accepted. From these the
best tree of every size and depth is computed, and the one with the most tokens per second wins. There is no such model
for Jacobi windows (their guesses improve the longer they stay in the window), so windows and the best tree are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.accounting import wait_for
from fastgen.drafters.acceptance import AcceptanceRule, Exact
from fastgen.drafters.decode import decode_plain, decode_speculative
from fastgen.drafters.drafter import Drafter
from fastgen.drafters.heads import WindowHeads
from fastgen.drafters.heads_source import window_source
from fastgen.drafters.law import TokenLaw
from fastgen.drafters.names import PLAIN, window_of
from fastgen.drafters.sources import DraftSource, TreeSource
from fastgen.drafters.targets import Prefix, Target
from fastgen.drafters.tree import Tree, chain, static_tree, widths_tree
from fastgen.drafters.verify import Decisions, Drafted, Noise, Rejection, reach_probability, reject_in_turn, strict

__all__ = ["Costs", "Planner", "best_tree", "choose_source"]

WINDOWS = (4, 6, 8, 12, 16, 20, 32)
WIDE_WINDOWS = ("jacobi-8x4", "jacobi-12x2", "jacobi-12x4")
_PROBE_WIDTHS = (4, 4, 4, 3, 2, 2)  # the tree whose acceptance is measured
_PROBE_CHAINS = (1, 3, 7, 15)
_MOST_NODES = 64


@dataclass(frozen=True)
class Costs:
    """Seconds per round.

    Attributes:
        fixed, per_node: of everything but drafting, for n nodes: fixed + per_node * n.
        per_level: of drafting one level.
    """

    fixed: float
    per_node: float
    per_level: float

    def of(self, nodes: int, levels: int) -> float:
        """Seconds of a round over `nodes` tokens (root included), drafted in `levels`."""
        return self.fixed + self.per_node * nodes + self.per_level * levels


class _Recorder(AcceptanceRule):
    """The exact rule; also records how often the j-th child at each depth is accepted when its turn comes."""

    name, loss = "exact", "distribution"

    def __init__(self, levels: int, slots: int) -> None:
        self.won, self.tried = torch.zeros(levels, slots), torch.zeros(levels, slots)

    def verify(self, drafted: Drafted, noise: Noise, spent: Tensor) -> Decisions:
        outcome = reject_in_turn(drafted, noise.coins, Rejection())
        children, depth = drafted.inner_children(), drafted.inner_depth()
        reach = torch.ones_like(drafted.tokens, dtype=torch.float32)
        turn = reach_probability(outcome.chance)
        for place, node in enumerate(drafted.tree.internal.tolist()):  # parents come first
            exists = children[0, place] >= 0
            here = turn[:, place] * reach[:, node, None]
            level = int(depth[0, place])
            self.tried[level, : here.shape[1]] += (here * exists).sum(dim=0).cpu()
            taken = here * outcome.chance[:, place]
            self.won[level, : here.shape[1]] += (taken * exists).sum(dim=0).cpu()
            for slot, child in enumerate(children[0, place].tolist()):
                if child >= 0:
                    reach[:, child] = taken[:, slot]
        return strict(drafted, noise)

    @property
    def rates(self) -> list[list[float]]:
        """[depth][slot]; 0 where nothing was recorded."""
        return (self.won / self.tried.clamp_min(1e-9)).tolist()


class Planner:
    """The best tree of every size (most expected tokens), by dynamic programming over depth, slot and size.

    Args:
        rates: [depth][slot], probability that a child is accepted when its turn comes.
        depth: maximum depth.
    """

    def __init__(self, rates: Sequence[Sequence[float]], depth: int) -> None:
        self.rates = [list(level) for level in rates[:depth]]
        self._known: dict[tuple[int, int, int], tuple[float, int]] = {}

    def value(self, level: int, slot: int, nodes: int) -> float:
        """Expected accepted tokens below a node at depth `level`, with `nodes` left for slots from `slot` on."""
        return self._best(level, slot, nodes)[0]

    def _best(self, level: int, slot: int, nodes: int) -> tuple[float, int]:
        """`value`, and the number of nodes below child `slot`; -1 if there is no such child."""
        if nodes == 0 or level >= len(self.rates) or slot >= len(self.rates[level]):
            return 0.0, -1
        key = (level, slot, nodes)
        if key not in self._known:
            rate = self.rates[level][slot]
            options = (
                (rate * (1 + self.value(level + 1, 0, k)) + (1 - rate) * self.value(level, slot + 1, nodes - 1 - k), k)
                for k in range(nodes)
            )
            self._known[key] = max(options, key=lambda option: option[0])
        return self._known[key]

    def paths(self, nodes: int) -> list[list[int]]:
        """Rank paths of the best tree."""
        found: list[list[int]] = []

        def fill(parent: list[int], slot: int, spend: int) -> None:
            _, below = self._best(len(parent), slot, spend)
            if below < 0:
                return
            path = [*parent, slot]
            found.append(path)
            fill(path, 0, below)
            fill(parent, slot + 1, spend - 1 - below)

        fill([], 0, nodes)
        return found


def best_tree(rates: Sequence[Sequence[float]], costs: Costs, most: int = _MOST_NODES) -> Tree:
    """The tree with the most tokens per second.

    Raises:
        ValueError: no child is ever accepted.
    """
    if not rates or max(rates[0], default=0.0) <= 0:
        raise ValueError("rates: no drafted token was ever accepted")
    best, best_speed = [[0]], 0.0
    for depth in range(1, len(rates) + 1):
        planner = Planner(rates, depth)
        for count in range(1, most + 1):
            speed = (1 + planner.value(0, 0, count)) / costs.of(count + 1, depth)
            if speed > best_speed:
                best, best_speed = planner.paths(count), speed
    return static_tree(best)


def choose_source(
    target: Target,
    drafter: Drafter | None,
    rule: AcceptanceRule,
    prefix: Prefix,
    law: TokenLaw,
    repeats: int = 2,
    compile: bool = False,
    heads: WindowHeads | None = None,
) -> tuple[DraftSource | None, str]:
    """Measure which source drafts fastest.

    Args:
        target: the model.
        drafter: made for the target; None tries Jacobi windows only.
        rule: the acceptance rule to be used.
        prefix: prompts of a typical batch; whole pictures are drawn to measure, with separate generators.
        law: sampling settings; temperature 0 is measured as 1.
        repeats: pictures per measurement.
        compile: measure compiled rounds.
        heads: also try windows with these heads.

    Returns:
        a source and its name; None and "plain" if the plain loop is fastest.
    """
    warm = TokenLaw(law.guidance_scale, law.temperature or 1.0, law.top_k, law.top_p)

    def seconds_per_token(source: DraftSource | None, judge: AcceptanceRule) -> tuple[float, float]:
        """Of the fastest picture, and seconds per round."""
        speeds = []
        for repeat in range(repeats + 1):
            generators = [torch.Generator().manual_seed(repeat) for _ in range(prefix.images)]
            start = time.perf_counter()
            if source is None:
                decoded = decode_plain(target, prefix, warm, generators, compile=compile)
            else:
                graph = compile and not isinstance(judge, _Recorder)
                decoded = decode_speculative(target, source, judge, prefix, warm, generators, compile=graph)
            wait_for(prefix.embeds.device)
            elapsed = time.perf_counter() - start
            speeds.append((elapsed / target.num_tokens, elapsed / decoded.target_passes))
        return min(speeds[1:])

    # A rule that compares siblings also tries several candidates per place.
    places = [window for window in WINDOWS if window <= target.num_tokens]
    wide = [name for name in WIDE_WINDOWS if rule.needs_hidden and window_of(name)[0] <= target.num_tokens]
    names = [*(f"jacobi-{window}" for window in places), *wide]
    if heads is not None:
        names += [
            f"heads-{window}{more}"
            for window in places
            if window <= heads.config.window
            for more in ("", *(["x2-2"] if rule.needs_hidden and window > 2 else []))
        ]
    sources: dict[str, DraftSource | None] = {PLAIN: None} | {name: window_source(name, rule, heads) for name in names}
    if drafter is not None:
        tree = best_tree(*_measure(drafter, seconds_per_token))
        widths = "-".join(str(len(level)) for level in tree.levels[1:])
        sources[f"auto {widths}"] = TreeSource(drafter, tree, sampled=law.temperature > 0)
    tried = {name: seconds_per_token(source, rule)[0] for name, source in sources.items()}
    best = min(tried, key=lambda name: tried[name])
    return sources[best], best


def _measure(
    drafter: Drafter, seconds_per_token: Callable[[DraftSource, AcceptanceRule], tuple[float, float]]
) -> tuple[list[list[float]], Costs]:
    """Acceptance rates on a wide tree, and costs fitted to rounds of chains and that tree."""
    depth = min(len(_PROBE_WIDTHS), drafter.max_depth or len(_PROBE_WIDTHS))
    probe = widths_tree(_PROBE_WIDTHS[:depth])
    recorder = _Recorder(depth, probe.max_children)
    seconds_per_token(TreeSource(drafter, probe, sampled=True), recorder)  # not timed: recording is slow
    rows, seconds = [], []
    for tree in (probe, *(chain(length) for length in _PROBE_CHAINS if length <= (drafter.max_depth or length))):
        _, of_round = seconds_per_token(TreeSource(drafter, tree, sampled=True), Exact())
        rows.append([1.0, float(tree.n), float(tree.max_depth)])
        seconds.append(of_round)
    fitted = torch.linalg.lstsq(torch.tensor(rows), torch.tensor(seconds)[:, None], driver="gelsd").solution[:, 0]
    fixed, per_node, per_level = (max(float(value), 1e-9) for value in fitted)
    return recorder.rates, Costs(fixed, per_node, per_level)
