"""The loop of policies that search transition by transition: it asks a policy how often to try and what to accept."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field

from fastgen.pipelines.search.engine import Ask, Chain, Node, Program, better, rank
from fastgen.pipelines.search.policy import Policy

__all__ = ["State", "StepPolicy"]


@dataclass
class State:
    """State of a chain in the loop."""

    chain: Chain
    scores: list[float] = field(default_factory=list)
    best: Node | None = None
    accepted: float = -math.inf
    trajectory: int = 0  # that it is at

    def see(self, node: Node) -> float:
        """Take a node in; the best score before it."""
        before = -math.inf if self.best is None else self.best.score
        self.scores.append(node.score)
        self.best = better(self.best, node)
        return before


class StepPolicy(Policy):
    """The loop over transitions (section 3.2 of our specification).

    Attributes:
        starts: noises that are drawn and scored before the first transition; the search continues with the best.
        wave: candidates that are tried together. It changes what a search costs, not which way it takes: what comes
            behind the accepted one of a wave is paid for and not followed. A finished picture among them still counts.
        reserve: a trajectory that was begun can always be finished.
    """

    starts: int = 1
    wave: int = 1
    reserve: bool = True

    def least(self, transitions: int) -> int:
        return self.chains * (self.starts + transitions)

    @abstractmethod
    def may_try(self, step: int, tries: int, left: float, memory: dict[str, float]) -> bool:
        """Whether transition `step` may be tried once more after `tries`, with this many evaluations left beyond what
        finishing takes."""

    @abstractmethod
    def accept(self, step: int, score: float, before: float, state: State) -> bool:
        """Whether the search continues with a candidate; `before` is the best score before it."""

    def on_advance(self, step: int, tries: int, accepted: bool, memory: dict[str, float]) -> None:
        """After a transition."""

    def enough(self, score: float, state: State) -> bool:
        """Whether no further start is drawn after one of that score."""
        return False

    def end(self, best: Node, step_best: Node) -> Node:
        """Choose between the best node of all and the best one at the last time that was reached."""
        return step_best

    def again(self, end: Node, state: State) -> bool:
        """Whether another trajectory is begun after one that came to `end`, if the budget pays for it."""
        return False

    def hopeless(self, node: Node, state: State) -> bool:
        """Whether another trajectory is begun rather than a candidate continued, if the budget pays for it."""
        return False

    def looks(self, index: int, state: State) -> bool:
        """Whether what is evaluated at a time before the last is scored; if not, the first candidate is gone on
        with."""
        return True

    def remember(self, chain: Chain) -> dict[str, float]:
        """The policy's state of a chain between transitions."""
        return {}

    def program(self, chain: Chain) -> Program:
        state, found = State(chain), None
        while True:
            end = yield from self._trajectory(state)
            if end is not None:  # else it was given up for another one
                if found is None or rank(end) > rank(found):
                    found = end
                if not (self.again(end, state) and self._another(chain)):
                    break
            state.trajectory += 1
        chain.pool.owed.pop(chain.number, None)
        return found

    def _another(self, chain: Chain) -> bool:
        """Whether the budget pays for one more whole trajectory, after what other chains need."""
        left = chain.pool.left(chain.number)
        return left > 0 and left + chain.pool.owed.get(chain.number, 0) >= self.starts + chain.sampler.transitions

    def _trajectory(self, state: State) -> Generator[Ask, list[Node], Node | None]:
        """Run from a start to its end; None: it was given up."""
        chain, memory, pool = state.chain, self.remember(state.chain), state.chain.pool
        last = chain.sampler.transitions
        node = yield from self._start(state)
        step_best = node
        for step in range(last):
            if chain.pool.done:  # another chain's picture is good enough
                break
            if step + 1 < last and not self.looks(step + 1, state):
                self._owe(chain, last - step - 1)
                latents = node.step(chain.noise(step, 0, state.trajectory))
                (node,) = yield chain.ask([latents], step + 1, [node], scored=False)
                step_best = node
                chain.tries.append((1, True))
                continue
            found: Node | None = None
            tries, accepted = 0, False
            self._owe(chain, last - step)
            while not accepted and (width := self._width(step, tries, chain, memory)) > 0:
                proposals = [node.step(chain.noise(step, tries + i, state.trajectory)) for i in range(width)]
                self._owe(chain, last - step - 1)
                answers = yield chain.ask(proposals, step + 1, [node] * width)
                for candidate in answers:
                    before = state.see(candidate)
                    accepted = self.accept(step, candidate.score, before, state)
                    if self._good(candidate, chain) or accepted or better(found, candidate) is candidate:
                        found = candidate
                    tries += 1
                    if accepted or pool.done:
                        break
                if pool.done:
                    break
            if found is None and pool.done:
                break
            if found is None and (self.reserve or (pool.late and pool.affords_one())):  # what finishing takes
                latents = node.step(chain.noise(step, 0, state.trajectory))
                (found,) = yield chain.ask([latents], step + 1, [node])
                state.see(found)
                tries = 1
            if found is None:
                break
            chain.tries.append((tries, accepted))
            self.on_advance(step, tries, accepted, memory)
            state.accepted = found.score
            if not (found.last or pool.done) and self.hopeless(found, state) and self._another(chain):
                return None
            node = step_best = found
        pool.owed.pop(chain.number, None)
        return self.end(state.best or node, step_best)

    def _start(self, state: State) -> Generator[Ask, list[Node], Node]:
        chain, last = state.chain, state.chain.sampler.transitions
        self._owe(chain, last)
        drawn, best = state.trajectory * self.starts, None
        for first in range(0, self.starts, self.wave):
            count = min(self.wave, self.starts - first)
            if first and chain.pool.left(chain.number) < count:
                break
            scored = not last or self.starts > 1 or self.looks(0, state)
            latents = [chain.first(drawn + first + i) for i in range(count)]
            for node in (yield chain.ask(latents, 0, scored=scored)):
                if not scored:
                    return node
                state.see(node)
                best = better(best, node)
                if self.enough(node.score, state):
                    break
            else:
                continue
            break
        kept = best or node
        state.accepted = kept.score
        return kept

    def _width(self, step: int, tries: int, chain: Chain, memory: dict[str, float]) -> int:
        """How many candidates to try now: as many of a wave as may be tried one after the other."""
        # Of what the chain keeps back for itself, one evaluation is for this transition.
        left = chain.pool.left(chain.number) + (1 if self.reserve and tries == 0 else 0)
        width = 0
        while width < self.wave and left - width >= 1 and self.may_try(step, tries + width, left - width, memory):
            width += 1
        return width

    def _owe(self, chain: Chain, transitions: int) -> None:
        """Keep back what finishing takes."""
        chain.pool.owed[chain.number] = transitions if self.reserve else 0

    def _good(self, node: Node, chain: Chain) -> bool:
        """Whether a finished picture is good enough: then all chains of the prompt are done."""
        if node.last and chain.pool.budget.met_by(node.score):
            chain.pool.done = True
        return chain.pool.done
